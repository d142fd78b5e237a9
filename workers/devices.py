"""Which device slots this machine has, found without importing torch and without touching CUDA."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

from artifacts.errors import FieldError, RequestInvalid
from workers.provider import Slot

MAX_CPU_SLOTS = 256
_SPEC = re.compile(r"(?P<kind>cpu|cuda)(?::(?P<rest>[0-9]+(?:,[0-9]+)*))?")


def parse_devices(text: str) -> tuple[Slot, ...]:
    """The slots of a `devices` setting.

    "auto": one slot for each CUDA device, or one CPU slot where there is none. "cpu:4": four CPU slots, whatever the
    number of cores. "cuda": all CUDA devices; "cuda:0,2": these two.

    Raises:
        RequestInvalid: not of that form, or a device that this machine does not have.
    """
    wanted = text.strip().lower()
    if wanted == "auto":
        return _cuda_slots(range(cuda_device_count())) or _cpu_slots(1)
    match = _SPEC.fullmatch(wanted)
    if match is None:
        raise _refused(text, "it must be auto, cpu:<slots> or cuda:<index>,<index>")
    rest = match["rest"]
    if match["kind"] == "cpu":
        return _parse_cpu(text, rest)
    found = cuda_device_count()
    indices = list(range(found)) if rest is None else [int(part) for part in rest.split(",")]
    absent = sorted({index for index in indices if index >= found})
    if absent or not indices:
        raise _refused(text, f"this machine has {found} usable CUDA devices" + (f", no {absent}" if absent else ""))
    if len(set(indices)) != len(indices):
        raise _refused(text, "a device is listed twice; a device is one slot")
    return _cuda_slots(indices)


def _parse_cpu(text: str, rest: str | None) -> tuple[Slot, ...]:
    if rest is not None and "," in rest:
        raise _refused(text, "cpu takes a number of slots, as in cpu:2")
    count = 1 if rest is None else int(rest)
    if not 1 <= count <= MAX_CPU_SLOTS:
        raise _refused(text, f"a pool has 1 to {MAX_CPU_SLOTS} CPU slots")
    return _cpu_slots(count)


def _cpu_slots(count: int) -> tuple[Slot, ...]:
    return tuple(Slot(f"cpu:{index}", "cpu") for index in range(count))


def _cuda_slots(indices: range | list[int]) -> tuple[Slot, ...]:
    return tuple(Slot(f"cuda:{index}", f"cuda:{index}") for index in indices)


def _refused(text: str, why: str) -> RequestInvalid:
    return RequestInvalid(
        f"The devices setting {text!r} can not be used: {why}.",
        hint="Set RANKWISE_DEVICES to auto, cpu:2 or cuda:0,1.",
        errors=[FieldError("/devices", why)],
    )


def visible_devices() -> list[str] | None:
    """The entries of CUDA_VISIBLE_DEVICES up to the first invalid one, or None when it is not set."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    entries = [entry.strip() for entry in text.split(",")]
    kept: list[str] = []
    for entry in entries:
        if not entry or entry == "-1":
            break
        kept.append(entry)
    return kept


def cuda_device_count() -> int:
    """CUDA devices that a worker of this server could use: 0 when torch is a CPU build or there is no driver."""
    if not torch_is_built_for_cuda():
        return 0
    installed = _nvml_device_count()
    visible = visible_devices()
    return installed if visible is None or installed == 0 else len(visible)


def torch_is_built_for_cuda() -> bool:
    """Read from the version file of the installed torch, which is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return False
    version_file = Path(spec.submodule_search_locations[0]) / "version.py"
    if not version_file.is_file():
        return False
    return re.search(r"^cuda\b[^=\n]*=\s*['\"]", version_file.read_text(encoding="utf-8"), re.MULTILINE) is not None


def _nvml_device_count() -> int:
    """Ask the driver's management library, which creates no CUDA context."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0  # no NVIDIA driver on this machine
    if nvml.nvmlInit_v2() != 0:
        return 0
    count = ctypes.c_uint(0)
    status = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    nvml.nvmlShutdown()
    return count.value if status == 0 else 0


def worker_environment(slots: Sequence[Slot]) -> dict[str, str]:
    """Environment variables that bind a worker process to its slots: it sees their CUDA devices and no other."""
    indices = [int(slot.device.removeprefix("cuda:")) for slot in slots if slot.device.startswith("cuda:")]
    if not indices:
        return {"CUDA_VISIBLE_DEVICES": ""}
    visible = visible_devices()
    return {
        # NVML counts by bus id; CUDA's own default order puts the fastest device first.
        "CUDA_DEVICE_ORDER": os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
        "CUDA_VISIBLE_DEVICES": ",".join(str(index) if visible is None else visible[index] for index in indices),
    }


def device_in_worker(slot: Slot) -> str:
    """What torch calls the slot's device inside its worker process."""
    return "cuda:0" if slot.device.startswith("cuda:") else "cpu"


def threads_per_slot(slots: int) -> int:
    """Threads of each worker: the cores that this process may use, shared out; the operator's OMP_NUM_THREADS wins."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores // max(1, slots))
