"""Rounds of chaos: jobs of every kind, while a seeded adversary kills, freezes and fills whatever there is.

`CHAOS_SEED=7 CHAOS_ROUNDS=1 pytest tests/chaos/test_chaos.py -m slow` plays a round again: the same jobs at the same
moments, the same acts on the same targets. `CHAOS_JOBS` and `CHAOS_SECONDS` change the size of a round;
`CHAOS_MOUNT=0` fills the disk without root, by a limit on the size of files.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos_databases import PostgresServer, PostgresUnderChaos, SqliteUnderChaos
from chaos_disk import Disk
from chaos_plan import make_plan
from chaos_round import LEASE_SECONDS, Round

from artifacts import intake
from storage import adapters
from storage.blobs import BlobStore
from storage.database import Database

FIRST_SEED = int(os.environ.get("CHAOS_SEED", "20261124"))
ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "1"))
JOBS = int(os.environ.get("CHAOS_JOBS", "220"))
SECONDS = float(os.environ.get("CHAOS_SECONDS", "45"))
MOUNT = os.environ.get("CHAOS_MOUNT", "1") == "1"
SEEDS = range(FIRST_SEED, FIRST_SEED + ROUNDS)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(540)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk", mount=MOUNT)
    yield disk
    disk.close()


@pytest.fixture(scope="session")
def chaos_postgres() -> Iterator[PostgresServer]:
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture
def add_adapters(tmp_path: Path, write_adapter: Any) -> Callable[[Database, BlobStore], list[str]]:
    """Stores two small random adapters; gives their ids."""

    def add(database: Database, blobs: BlobStore) -> list[str]:
        made = []
        for seed, name in enumerate("ab"):
            directory = write_adapter(tmp_path / "uploads" / name, seed)
            manifest = intake.inspect(directory)
            for entry in manifest.files:
                blobs.put_file(directory / entry.path, entry.sha256)
            with database.write() as session:
                made.append(adapters.add_adapter(session, manifest, name=name)[0].id)
        return made

    return add


@pytest.mark.parametrize("seed", SEEDS)
def test_a_round_on_sqlite(seed: int, tmp_path: Path, disk: Disk, add_adapters: Any) -> None:
    plan = make_plan(seed, jobs=JOBS, seconds=SECONDS, lease=LEASE_SECONDS, restartable=False)
    Round(plan, tmp_path, disk, SqliteUnderChaos(disk.folder, tmp_path / "clock"), add_adapters).run()


@pytest.mark.postgres
@pytest.mark.parametrize("seed", SEEDS)
def test_a_round_on_postgres(
    seed: int, tmp_path: Path, disk: Disk, add_adapters: Any, chaos_postgres: PostgresServer
) -> None:
    plan = make_plan(seed, jobs=JOBS, seconds=SECONDS, lease=LEASE_SECONDS, restartable=True)
    under = PostgresUnderChaos(chaos_postgres, f"chaos_{uuid.uuid4().hex}")
    try:
        Round(plan, tmp_path, disk, under, add_adapters).run()
    finally:
        under.close()
