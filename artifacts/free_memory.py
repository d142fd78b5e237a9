"""How much memory a device still has to give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil
import torch

_MEMBERSHIP, _MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def free_memory(device: str) -> int:
    """Bytes that can still be had: of the GPU, what this process keeps unused included; or of the main memory, within
    the limits of the control groups that the process is in, such as that of a container."""
    if device.startswith("cuda"):
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return min([int(psutil.virtual_memory().available), *_left_to_groups()])


@dataclass(frozen=True, slots=True)
class _Names:
    """Files of a control group; `cached` are the lines of memory.stat whose bytes the kernel gives back when asked."""

    limit: str
    used: str
    cached: tuple[str, ...]


_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = _Names("memory.max", "memory.current", ("inactive_file", "active_file"))


def _left_to_groups() -> Iterator[int]:
    """What is left to each group with a limit, from the process's own one to the outermost that is seen."""
    for folder, names in _groups():
        left = _left(folder, names)
        if left is not None:
            yield left


def _groups() -> Iterator[tuple[Path, _Names]]:
    """A container may see the host's path of its group, and its own group where the hierarchy is mounted: what is
    missing is passed over."""
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            mount, names = _MOUNT, _V2
        elif "memory" in controllers.split(","):
            mount, names = _MOUNT / "memory", _V1
        else:
            continue
        own = PurePosixPath(path.lstrip("/"))
        if ".." not in own.parts:
            yield from ((mount / part, names) for part in (own, *own.parents))


def _left(folder: Path, names: _Names) -> int | None:
    """None: there is no limit, or no such group."""
    try:
        limit = (folder / names.limit).read_text().strip()
        if limit == "max":
            return None
        used = int((folder / names.used).read_text())
        stat = _table((folder / "memory.stat").read_text())
    except (OSError, ValueError):
        return None
    # Pages of files count as used, and are given back as soon as others need the room: as `available` has it.
    cached = sum(stat.get(name, 0) for name in names.cached)
    return max(int(limit) - max(used - cached, 0), 0)


def _table(text: str) -> Mapping[str, int]:
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
