"""The `devices` setting. There need be no GPU: what the driver and torch would say is put in their place."""

from __future__ import annotations

import os

import pytest

from artifacts.errors import RequestInvalid
from workers import devices
from workers.provider import Slot


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with four CUDA devices, all visible."""
    monkeypatch.setattr(devices, "_nvml_device_count", lambda: 4)
    monkeypatch.setattr(devices, "torch_is_built_for_cuda", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def names(text: str) -> list[str]:
    return [slot.name for slot in devices.parse_devices(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("cpu", ["cpu:0"]), ("cpu:3", ["cpu:0", "cpu:1", "cpu:2"]), (" CPU:1 ", ["cpu:0"])],
)
def test_cpu_slots_are_faked_at_will(text: str, expected: list[str]) -> None:
    assert names(text) == expected
    assert {slot.device for slot in devices.parse_devices(text)} == {"cpu"}


def test_cuda_slots(gpus: pytest.MonkeyPatch) -> None:
    assert names("auto") == names("cuda") == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert names("cuda:2,0") == ["cuda:2", "cuda:0"]


def test_auto_without_a_gpu_is_one_cpu_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_nvml_device_count", lambda: 0)
    assert names("auto") == ["cpu:0"]


def test_auto_with_a_cpu_build_of_torch_uses_no_gpu(gpus: pytest.MonkeyPatch) -> None:
    gpus.setattr(devices, "torch_is_built_for_cuda", lambda: False)
    assert names("auto") == ["cpu:0"]


@pytest.mark.parametrize(
    "text",
    ["", "gpu", "cpu:0", "cpu:257", "cpu:1,2", "cuda:", "cuda:4", "cuda:0,0", "cuda:-1", "cpu:2 cuda:0", "cpu:1e3"],
)
def test_other_values_are_refused_by_name(gpus: pytest.MonkeyPatch, text: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        devices.parse_devices(text)
    assert repr(text) in caught.value.detail
    assert caught.value.errors[0].pointer == "/devices"


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_nvml_device_count", lambda: 0)
    with pytest.raises(RequestInvalid, match="0 usable CUDA devices"):
        devices.parse_devices("cuda")


@pytest.mark.parametrize(("visible", "count"), [("2,3", 2), ("", 0), ("-1", 0), ("0,-1,2", 1), ("GPU-abc, GPU-def", 2)])
def test_only_visible_devices_count(gpus: pytest.MonkeyPatch, visible: str, count: int) -> None:
    gpus.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.cuda_device_count() == count


def test_a_worker_sees_its_own_device_only(gpus: pytest.MonkeyPatch) -> None:
    slot = Slot("cuda:1", "cuda:1")
    assert devices.worker_environment([slot])["CUDA_VISIBLE_DEVICES"] == "1"
    assert devices.worker_environment([slot])["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    gpus.setenv("CUDA_VISIBLE_DEVICES", "GPU-abc,GPU-def")
    assert devices.worker_environment([slot])["CUDA_VISIBLE_DEVICES"] == "GPU-def"
    assert devices.worker_environment([Slot("cpu:0", "cpu")]) == {"CUDA_VISIBLE_DEVICES": ""}
    assert devices.device_in_worker(slot) == "cuda:0"
    assert devices.device_in_worker(Slot("cpu:0", "cpu")) == "cpu"


def test_the_build_of_torch_is_read_without_importing_it() -> None:
    import torch.version

    assert devices.torch_is_built_for_cuda() is (torch.version.cuda is not None)


def test_cores_are_shared_out_unless_the_operator_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)))
    assert [devices.threads_per_slot(slots) for slots in (1, 3, 16, 40)] == [16, 5, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert devices.threads_per_slot(1) == 2
