"""Which slots a Ray cluster has: worked out from the resources of its living nodes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

from artifacts.errors import FieldError, RequestInvalid
from workers.provider import Slot
from workers.ray_messages import ClusterNode, Seat

CUSTOM_RESOURCE = "rankwise_slot"
NODE_ID_SHOWN = 12
MAX_SLOTS = 10_000
_SPEC = re.compile(r"(?P<kind>gpu|cpu):(?P<limit>[0-9]+)")
_EPSILON = 1e-6

Kind = Literal["gpu", "slot", "cpu"]


@dataclass(frozen=True, slots=True)
class SlotRules:
    """How the nodes' resources become slots.

    Attributes:
        kind: what a slot is made of; None: whichever of GPUs, the resource `rankwise_slot` and CPUs there is first.
        limit: at most so many slots.
        resources: what one slot reserves, in place of one of its kind.
    """

    kind: Kind | None = None
    limit: int = MAX_SLOTS
    resources: Mapping[str, float] | None = None

    @classmethod
    def parse(cls, devices: str, resources: Mapping[str, float] | None = None) -> SlotRules:
        """The rules of the settings `devices` (auto, gpu:<limit> or cpu:<limit>) and `ray_slot_resources`.

        Raises:
            RequestInvalid: not of that form.
        """
        if resources:
            _check_resources(resources)
        text = devices.strip().lower()
        if text == "auto":
            return cls(resources=resources or None)
        match = _SPEC.fullmatch(text)
        if match is None or not 1 <= int(match["limit"]) <= MAX_SLOTS:
            why = f"on Ray it must be auto, gpu:<slots> or cpu:<slots>, with 1 to {MAX_SLOTS} slots"
            raise RequestInvalid(
                f"The devices setting {devices!r} can not be used: {why}.",
                hint="Set RANKWISE_DEVICES to auto, gpu:8 or cpu:2.",
                errors=[FieldError("/devices", why)],
            )
        kind: Kind = "gpu" if match["kind"] == "gpu" else "cpu"
        if resources and (kind == "gpu") != (resources.get("GPU", 0) > 0):
            raise _refused(resources, f"they do not fit to the devices setting {devices!r}")
        return cls(kind, int(match["limit"]), resources or None)

    def of_slot(self, nodes: Sequence[ClusterNode]) -> tuple[Kind, Mapping[str, float]]:
        """What one slot of this cluster is, and what it reserves."""
        if self.resources is not None:
            kind: Kind = "gpu" if self.resources.get("GPU", 0) > 0 else self.kind or "slot"
            return kind, self.resources
        found = self.kind or _kind_of(nodes)
        names: dict[Kind, str] = {"gpu": "GPU", "slot": CUSTOM_RESOURCE, "cpu": "CPU"}
        return found, {names[found]: 1.0}


class SlotCatalogue:
    """The slots of the nodes that are there now. One that is there stays the same for as long as its node lives."""

    def __init__(self, rules: SlotRules) -> None:
        self._rules = rules
        self._seats: dict[str, Seat] = {}
        self._slots: tuple[Slot, ...] = ()

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self._slots

    def seat(self, slot: str) -> Seat | None:
        """The slot's place in the cluster; None when its node is gone."""
        return self._seats.get(slot)

    def update(self, nodes: Sequence[ClusterNode]) -> None:
        """Take in which nodes live. A limit keeps the slots that are there, then takes from all nodes in turn."""
        kind, resources = self._rules.of_slot(nodes)
        per_node = []
        for node in sorted(nodes, key=lambda node: node.id):
            count = slots_of(node, resources)
            cores = node.resources.get("CPU") or os.cpu_count() or 1
            threads = max(1, int(cores) // max(1, count))
            shown = node.id[:NODE_ID_SHOWN]
            per_node.append([Seat(f"{kind}:{i}@{shown}", node.id, resources, threads) for i in range(count)])
        possible = {seat.slot: seat for turn in zip_longest(*per_node) for seat in turn if seat is not None}
        names = [name for name in self._seats if name in possible]
        names += [name for name in possible if name not in self._seats]
        self._seats = {name: possible[name] for name in names[: self._rules.limit]}
        self._slots = tuple(
            Slot(name, f"cuda:{_index(name)}" if kind == "gpu" else "cpu") for name in sorted(self._seats, key=_place)
        )


def slots_of(node: ClusterNode, resources: Mapping[str, float]) -> int:
    """How many slots the node has in all, whether or not something else uses its resources now."""
    return min(int(node.resources.get(name, 0) / amount + _EPSILON) for name, amount in resources.items() if amount)


def _index(slot: str) -> int:
    return int(slot.partition("@")[0].partition(":")[2])


def _place(slot: str) -> tuple[str, int]:
    return slot.partition("@")[2], _index(slot)


def _kind_of(nodes: Sequence[ClusterNode]) -> Kind:
    if any(node.resources.get("GPU", 0) >= 1 for node in nodes):
        return "gpu"
    return "slot" if any(node.resources.get(CUSTOM_RESOURCE, 0) >= 1 for node in nodes) else "cpu"


def _check_resources(resources: Mapping[str, Any]) -> None:
    for name, amount in resources.items():
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 < amount < math.inf:
            raise _refused(resources, f"{name} must be a number above 0")
        if amount > 1 and amount != int(amount):
            raise _refused(resources, f"Ray wants a whole number for {name}, or one below 1")
    if resources.get("GPU", 0) > 1:
        raise _refused(resources, "a slot has one GPU or a part of one; jobs on several devices take several slots")


def _refused(resources: Mapping[str, Any], why: str) -> RequestInvalid:
    return RequestInvalid(
        f"The resources of a slot, {dict(resources)}, can not be used: {why}.",
        hint='Set RANKWISE_RAY_SLOT_RESOURCES as {"GPU": 1, "CPU": 4}.',
        errors=[FieldError("/ray_slot_resources", why)],
    )
