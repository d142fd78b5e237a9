"""Free memory within the limits of control groups, of either version."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from artifacts import free_memory as module
from artifacts.free_memory import free_memory

GIB = 2**30


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with 64 GiB available."""
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    monkeypatch.setattr(module, "_MOUNT", tmp_path / "sys")
    monkeypatch.setattr(module, "_MEMBERSHIP", tmp_path / "membership")


def group(folder: Path, limit: str, used: int, stat: str, names: tuple[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip((*names, "memory.stat"), (limit, str(used), stat), strict=True):
        (folder / name).write_text(f"{text}\n")


V2 = ("memory.max", "memory.current")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def test_without_groups_it_is_what_the_machine_has(tmp_path: Path) -> None:
    assert free_memory("cpu") == 64 * GIB
    (tmp_path / "membership").write_text("0::/gone\n")
    assert free_memory("cpu") == 64 * GIB


def test_the_tightest_group_above_the_process_counts_and_pages_of_files_do_not(tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("0::/pods/one\n")
    group(tmp_path / "sys" / "pods" / "one", "max", 5 * GIB, "", V2)
    assert free_memory("cpu") == 64 * GIB
    files = f"anon {2 * GIB}\ninactive_file {1 * GIB}\nactive_file {2 * GIB}"
    group(tmp_path / "sys" / "pods", str(8 * GIB), 5 * GIB, files, V2)
    assert free_memory("cpu") == 6 * GIB
    group(tmp_path / "sys" / "pods" / "one", str(3 * GIB), 2 * GIB, "anon 1", V2)
    assert free_memory("cpu") == GIB
    group(tmp_path / "sys" / "pods" / "one", str(GIB), 2 * GIB, "anon 1", V2)
    assert free_memory("cpu") == 0


def test_a_container_of_version_1_sees_its_group_at_the_mount(tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("5:cpu,cpuacct:/docker/f00\n4:memory:/docker/f00\n0::/\n")
    files = f"inactive_file 7\ntotal_inactive_file {GIB}\ntotal_active_file 0"
    group(tmp_path / "sys" / "memory", str(4 * GIB), 2 * GIB, files, V1)
    assert free_memory("cpu") == 3 * GIB
    group(tmp_path / "sys" / "memory", "9223372036854771712", 2 * GIB, files, V1)
    assert free_memory("cpu") == 64 * GIB


@pytest.mark.parametrize("membership", ["", "nonsense", "0::/../../etc\n", "4:memory:/../x\n"])
def test_what_can_not_be_read_limits_nothing(tmp_path: Path, membership: str) -> None:
    (tmp_path / "membership").write_text(membership)
    group(tmp_path / "sys", "many", 1, "", V2)
    assert free_memory("cpu") == 64 * GIB
