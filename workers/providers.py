"""Which provider runs the worker processes: the settings say."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from artifacts.errors import RequestInvalid
from workers.devices import parse_devices
from workers.local import LocalProvider
from workers.provider import WorkerProvider

PoolName = Literal["local", "ray"]


@dataclass(frozen=True, slots=True)
class RaySettings:
    """How to reach a Ray cluster and use it.

    Attributes:
        address: see `workers.ray_provider.RayProvider`.
        work_dir: folder on each node for scratch, cache and logs; None: one of the user's among the temporary files.
        slot_resources: what one slot reserves; None: see `workers.ray_slots.SlotRules`.
    """

    address: str = "auto"
    work_dir: str | None = None
    slot_resources: Mapping[str, float] | None = None


def make_provider(pool: PoolName, devices: str, ray: RaySettings) -> WorkerProvider:
    """The provider of a pool. Nothing is started before it is used.

    Raises:
        RequestInvalid: devices or resources that can not be, or Ray is not installed.
    """
    if pool == "local":
        return LocalProvider(parse_devices(devices))
    if importlib.util.find_spec("ray") is None:
        raise RequestInvalid(
            "The pool setting is ray, and Ray is not installed.",
            hint="Install the extra, pip install 'rankwise[ray]', here and on the nodes, or set RANKWISE_POOL=local.",
        )
    from workers.ray_provider import RayProvider
    from workers.ray_slots import SlotRules

    rules = SlotRules.parse(devices, ray.slot_resources)
    return RayProvider(ray.address, rules, work_dir=ray.work_dir)
