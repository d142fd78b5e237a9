"""Whether the devices that a job asks for exist: what can never run is refused when it is submitted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from app.service_state import alive_servers
from app.settings import Settings
from artifacts.errors import FieldError, RequestInvalid

DEVICES_PER_KIND: Mapping[str, int] = {"load_check": 1, "merge": 1, "quantize": 1, "transfer": 1}
"""The most devices that a job of a kind can use; a kind that is not here can use any number."""


def check_devices(session: Session, settings: Settings, kind: str, resources: Mapping[str, Any]) -> None:
    """Refuse more devices than the kind can use, or than any server that is alive has on one host.

    One device is always accepted: such a job waits until there is a server.

    Raises:
        RequestInvalid: at /resources/devices, naming what exists.
    """
    devices = int(resources.get("devices", 1))
    usable = DEVICES_PER_KIND.get(kind)
    if usable is not None and devices > usable:
        raise _refused(f"a job of kind {kind} can use {usable}, not {devices}", f"Ask for {usable}, or leave it out.")
    if devices <= 1:
        return
    slots = slots_by_host(session, settings)
    if not slots:
        raise _refused(
            f"no server of the pool is alive now, so it is not known whether {devices} devices of one host exist",
            "Try again when a server with that many devices runs.",
        )
    largest = max(slots.values())
    if devices > largest:
        found = ", ".join(f"{host} has {number}" for host, number in sorted(slots.items())[:10])
        raise _refused(
            f"no host has {devices} devices: {found}", f"Ask for at most {largest}: a job's devices are of one host."
        )


def slots_by_host(session: Session, settings: Settings) -> dict[str, int]:
    """Host → the most device slots that one server has there, of every server that is alive.

    A job runs on the slots of one server: what two servers have on one host does not add up.
    """
    found: dict[str, int] = {}
    for server in alive_servers(session, settings):
        for host, number in Counter(str(slot.get("host") or server.host) for slot in server.slots).items():
            found[host] = max(number, found.get(host, 0))
    return found


def _refused(problem: str, hint: str) -> RequestInvalid:
    return RequestInvalid(f"devices: {problem}", hint=hint, errors=[FieldError("/resources/devices", problem)])
