"""How the resources of a cluster's nodes become slots."""

from __future__ import annotations

from typing import Any

import pytest

from artifacts.errors import RequestInvalid
from workers.provider import Slot
from workers.ray_messages import ClusterNode
from workers.ray_slots import SlotCatalogue, SlotRules

A, B, C = "a" * 56, "b" * 56, "c" * 56


def node(identity: str, **resources: float) -> ClusterNode:
    return ClusterNode(identity, "10.0.0.1", resources)


def catalogue(*nodes: ClusterNode, devices: str = "auto", resources: dict[str, Any] | None = None) -> SlotCatalogue:
    made = SlotCatalogue(SlotRules.parse(devices, resources))
    made.update(nodes)
    return made


def names(made: SlotCatalogue) -> list[str]:
    return [slot.name for slot in made.slots]


def test_a_slot_for_each_gpu_of_the_cluster() -> None:
    made = catalogue(node(A, CPU=8, GPU=2), node(B, CPU=8, GPU=1), node(C, CPU=64))
    assert made.slots == (
        Slot(f"gpu:0@{A[:12]}", "cuda:0"),
        Slot(f"gpu:1@{A[:12]}", "cuda:1"),
        Slot(f"gpu:0@{B[:12]}", "cuda:0"),
    )
    seat = made.seat(f"gpu:1@{A[:12]}")
    assert seat is not None
    assert (seat.node, seat.resources, seat.threads) == (A, {"GPU": 1.0}, 4)


def test_without_gpus_the_custom_resource_and_without_that_the_cpus() -> None:
    assert names(catalogue(node(A, CPU=8), node(B, CPU=8, rankwise_slot=2))) == [
        f"slot:0@{B[:12]}",
        f"slot:1@{B[:12]}",
    ]
    made = catalogue(node(A, CPU=2), node(B, CPU=1))
    assert names(made) == [f"cpu:0@{A[:12]}", f"cpu:1@{A[:12]}", f"cpu:0@{B[:12]}"]
    assert {slot.device for slot in made.slots} == {"cpu"}


def test_a_limit_takes_from_all_nodes_in_turn_and_keeps_what_is_there() -> None:
    made = catalogue(node(B, CPU=4), node(C, CPU=4), devices="cpu:3")
    before = names(made)
    assert before == [f"cpu:0@{B[:12]}", f"cpu:1@{B[:12]}", f"cpu:0@{C[:12]}"]
    made.update([node(A, CPU=4), node(B, CPU=4), node(C, CPU=4)])
    assert names(made) == before, "a node that comes takes no slot from another one"
    made.update([node(A, CPU=4), node(C, CPU=4)])
    assert names(made) == [f"cpu:0@{A[:12]}", f"cpu:1@{A[:12]}", f"cpu:0@{C[:12]}"]
    assert made.seat(f"cpu:0@{B[:12]}") is None


def test_devices_name_what_is_used_of_a_cluster_that_has_more() -> None:
    nodes = node(A, CPU=4, GPU=1), node(B, CPU=2, rankwise_slot=5)
    assert names(catalogue(*nodes, devices="cpu:100")) == [f"cpu:{i}@{A[:12]}" for i in range(4)] + [
        f"cpu:{i}@{B[:12]}" for i in range(2)
    ]
    assert names(catalogue(*nodes, devices="GPU:8")) == [f"gpu:0@{A[:12]}"]
    assert names(catalogue(node(B, CPU=2), devices="gpu:8")) == []


def test_the_resources_of_a_slot_are_a_choice() -> None:
    nodes = node(A, CPU=9, GPU=4), node(B, CPU=9, GPU=0)
    made = catalogue(*nodes, resources={"GPU": 1, "CPU": 4})
    assert names(made) == [f"gpu:0@{A[:12]}", f"gpu:1@{A[:12]}"]
    assert made.seat(f"gpu:0@{A[:12]}").resources == {"GPU": 1, "CPU": 4}  # type: ignore[union-attr]
    assert len(catalogue(*nodes, resources={"GPU": 0.1}).slots) == 40
    assert names(catalogue(*nodes, devices="cpu:9", resources={"CPU": 5})) == [f"cpu:0@{A[:12]}", f"cpu:0@{B[:12]}"]
    assert names(catalogue(node(A, big=2.0), resources={"big": 1})) == [f"slot:0@{A[:12]}", f"slot:1@{A[:12]}"]


def test_a_cluster_without_nodes_has_no_slots() -> None:
    made = catalogue(node(A, CPU=1))
    made.update([])
    assert made.slots == ()


@pytest.mark.parametrize("devices", ["cuda:0", "gpu", "cpu:0", "gpu:10001", "cpu:-1", "", "gpu:1,2"])
def test_devices_of_another_form_are_refused(devices: str) -> None:
    with pytest.raises(RequestInvalid) as refused:
        SlotRules.parse(devices)
    assert refused.value.errors[0].pointer == "/devices"
    assert "RANKWISE_DEVICES" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("resources", "devices", "why"),
    [
        ({"GPU": 2}, "auto", "several slots"),
        ({"GPU": 0}, "auto", "above 0"),
        ({"CPU": -1}, "auto", "above 0"),
        ({"CPU": True}, "auto", "above 0"),
        ({"CPU": float("nan")}, "auto", "above 0"),
        ({"CPU": 1.5}, "auto", "whole number"),
        ({"CPU": float("inf")}, "auto", "above 0"),
        ({"CPU": 1}, "gpu:2", "do not fit"),
        ({"GPU": 1}, "cpu:2", "do not fit"),
    ],
)
def test_resources_that_can_not_be_are_refused(resources: dict[str, Any], devices: str, why: str) -> None:
    with pytest.raises(RequestInvalid) as refused:
        SlotRules.parse(devices, resources)
    assert refused.value.errors[0].pointer == "/ray_slot_resources"
    assert why in refused.value.detail
