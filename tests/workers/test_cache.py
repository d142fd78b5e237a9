"""The folder of downloaded blobs keeps to its size."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from workers.cache import place, prune


def fill(folder: Path, ages: dict[str, int], size: int = 100) -> None:
    for name, age in ages.items():
        path = folder / name[:2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
        os.utime(path, (1_000_000 - age, 1_000_000 - age))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    fill(tmp_path, {"aa1": 10, "aa2": 30, "bb3": 20, "cc4": 0})
    assert prune(tmp_path, 250) == 200
    assert names(tmp_path) == {"aa1", "cc4"}


def test_what_fits_stays(tmp_path: Path) -> None:
    fill(tmp_path, {"aa1": 10, "bb2": 20})
    assert prune(tmp_path, 200) == 0
    assert names(tmp_path) == {"aa1", "bb2"}
    assert prune(tmp_path / "absent", 0) == 0


def test_a_placed_file_survives_the_pruning(tmp_path: Path) -> None:
    fill(tmp_path / "cache", {"aa1": 10})
    place(tmp_path / "cache" / "aa" / "aa1", tmp_path / "here")
    assert prune(tmp_path / "cache", 0) == 100
    assert (tmp_path / "here").read_bytes() == b"x" * 100
    with pytest.raises(FileNotFoundError):
        place(tmp_path / "cache" / "aa" / "aa1", tmp_path / "there")


def test_without_hard_links_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_args: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    fill(tmp_path / "cache", {"aa1": 10})
    place(tmp_path / "cache" / "aa" / "aa1", tmp_path / "here")
    assert (tmp_path / "here").read_bytes() == b"x" * 100
