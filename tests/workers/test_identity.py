"""A server's id outlives its restarts, and only one process serves under it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from artifacts.errors import StateConflict
from workers.identity import ServerLock, read_server_id


def test_the_id_is_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with ThreadPoolExecutor(8) as threads:
        ids = set(threads.map(lambda _: read_server_id(folder), range(32)))
    assert len(ids) == 1
    assert ids == {read_server_id(folder)}
    assert [path.name for path in folder.iterdir()] == ["server-id"]


def test_other_folders_have_other_ids(tmp_path: Path) -> None:
    assert read_server_id(tmp_path / "a") != read_server_id(tmp_path / "b")


def test_the_lock_is_held_until_it_is_released(tmp_path: Path) -> None:
    first, second, other = ServerLock(tmp_path, "srv_a"), ServerLock(tmp_path, "srv_a"), ServerLock(tmp_path, "srv_b")
    first.acquire()
    other.acquire()
    with pytest.raises(StateConflict, match="srv_a"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    other.release()
