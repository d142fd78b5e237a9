"""Fixtures: a pool on a database of its own, with real worker processes and the kinds of jobs of `pool_kinds`."""

from __future__ import annotations

import importlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from artifacts import intake
from storage import adapters, jobs
from storage.blobs import BlobStore
from storage.database import Database
from storage.tables import JobAttemptRow, JobRow
from workers.devices import parse_devices
from workers.local import LocalProvider
from workers.provider import Slot, WorkerProvider
from workers.supervisor import PoolSettings, Supervisor

DEADLINE_SECONDS = 90.0
KIND_NAMES = [
    "succeed",
    "user_error",
    "bug",
    "exits",
    "crash",
    "infrastructure",
    "device_memory",
    "big_memory",
    "wait_for_gate",
    "wait_once",
    "stubborn",
    "deaf_then_succeed",
    "steps",
    "is_alive",
    "loaded",
    "gated_merge",
    "mortal_merge",
]
KINDS = {name: f"pool_kinds:{name}" for name in KIND_NAMES}


def wait_until(condition: Callable[[], Any], what: str, seconds: float = DEADLINE_SECONDS) -> Any:
    """The first true value of `condition`; fails when there is none before the deadline."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:g} s: {what}")
        pause.wait(0.01)
    return value


def exists(pid: int) -> bool:
    """Whether there is such a process, also one that nobody has reaped."""
    return Path(f"/proc/{pid}").exists()


class SlottedProvider:
    """The provider that all tests share, with the slots of one test."""

    def __init__(self, provider: WorkerProvider, slots: tuple[Slot, ...]) -> None:
        self._provider, self._slots = provider, slots
        self.start = provider.start
        self.close = provider.close

    def slots(self) -> tuple[Slot, ...]:
        return self._slots


@dataclass
class Gate:
    """A FIFO that a job waits for."""

    path: Path

    def open(self) -> None:
        fd = os.open(self.path, os.O_RDWR | os.O_NONBLOCK)
        os.write(fd, b"x")
        # Kept open until the test ends, or the byte would be lost when no reader has the FIFO open.
        self.fd = fd


@dataclass
class Pool:
    """What a test needs: submit jobs, start supervisors, look at rows."""

    folder: Path
    database: Database
    provider: LocalProvider
    supervisors: list[Supervisor] = field(default_factory=list)

    def settings(self, **changes: Any) -> PoolSettings:
        values: dict[str, Any] = {
            "server_id": "srv_test",
            "database_url": self.database.url.render_as_string(hide_password=False),
            "blob_url": (self.folder / "blobs").as_uri(),
            "data_dir": self.folder,
            "devices": "cpu:1",
            "lease_seconds": 30.0,
            "beat_seconds": 0.2,
            "grace_seconds": 10.0,
            "poll_seconds": 0.05,
            "retry_seconds": 0.01,
            "kinds": KINDS,
        }
        return PoolSettings(**values | changes)

    def supervisor(self, **changes: Any) -> Supervisor:
        settings = self.settings(**changes)
        supervisor = Supervisor(settings, SlottedProvider(self.provider, parse_devices(settings.devices)))
        self.supervisors.append(supervisor)
        return supervisor

    def start(self, **changes: Any) -> Supervisor:
        supervisor = self.supervisor(**changes)
        supervisor.start()
        return supervisor

    def submit(self, kind: str, resources: dict[str, Any] | None = None, **params: Any) -> str:
        with self.database.write() as session:
            return jobs.create_job(session, kind, params, resources=resources).id

    def cancel(self, job_id: str) -> None:
        with self.database.write() as session:
            jobs.request_cancel(session, job_id)

    def job(self, job_id: str) -> JobRow:
        with self.database.read() as session:
            return jobs.get_job(session, job_id)

    def attempts(self, job_id: str) -> list[JobAttemptRow]:
        with self.database.read() as session:
            return list(jobs.attempts_of(session, job_id))

    def events(self, job_id: str) -> list[dict[str, Any]]:
        with self.database.read() as session:
            return [{"type": row.type, **row.data} for row in jobs.events_after(session, job_id, 0)]

    def wait_for(self, job_id: str, *states: str, seconds: float = DEADLINE_SECONDS) -> JobRow:
        def reached() -> JobRow | None:
            job = self.job(job_id)
            return job if job.state in states else None

        what = f"{job_id} becomes {' or '.join(states)}; it is {self.job(job_id).state}"
        found: JobRow = wait_until(reached, what, seconds)
        return found

    def ended(self, job_id: str, seconds: float = DEADLINE_SECONDS) -> JobRow:
        return self.wait_for(job_id, "succeeded", "failed", "cancelled", seconds=seconds)

    def running_pid(self, job_id: str) -> int:
        """The process of a job that waits for its gate."""
        message = wait_until(lambda: self.job(job_id).message, f"{job_id} tells that it runs")
        return int(message.rpartition(" ")[2])

    def running_pid_at_gate(self, job_id: str) -> int:
        """The process of a job that tells other things before it waits for its gate."""
        wait_until(lambda: self.job(job_id).message.startswith("waiting in "), f"{job_id} waits for its gate")
        return self.running_pid(job_id)

    def gate(self, name: str = "gate") -> Gate:
        gate = Gate(self.folder / name)
        os.mkfifo(gate.path)
        return gate


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("database") / "rankwise.db"
    database = Database(f"sqlite:///{path}")
    database.upgrade()
    database.dispose()
    return path


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> Iterator[Database]:
    path = tmp_path / "rankwise.db"
    shutil.copyfile(empty_database, path)
    database = Database(f"sqlite:///{path}")
    yield database
    database.dispose()


@pytest.fixture(scope="session")
def provider() -> Iterator[LocalProvider]:
    """Without torch, which these tests do not need; `test_local` has one with it."""
    provider = LocalProvider(preload=("workers.runtime",))
    yield provider
    provider.close()


@pytest.fixture(scope="session")
def torch_provider() -> Iterator[LocalProvider]:
    """As in production: torch and the jobs are loaded before a worker is forked."""
    provider = LocalProvider(threads=1)
    yield provider
    provider.close()


@pytest.fixture(scope="session")
def write_adapter() -> Callable[..., Path]:
    """`adapter_files.write_adapter`, which needs torch."""
    return importlib.import_module("adapter_files").write_adapter


@pytest.fixture
def pool(database: Database, tmp_path: Path, provider: LocalProvider) -> Iterator[Pool]:
    threads = set(threading.enumerate())
    pool = Pool(tmp_path, database, provider)
    yield pool
    for supervisor in pool.supervisors:
        supervisor.stop()
    for used in (provider, pool.provider):
        used.logs.flush(10)
    left = [thread.name for thread in set(threading.enumerate()) - threads if thread.name != "worker-events"]
    assert left == []


@pytest.fixture
def add_adapter(pool: Pool, write_adapter: Any) -> Callable[..., str]:
    """Stores a random adapter (`adapter_files.write_adapter`) under a name; returns its id."""
    blobs = BlobStore(pool.settings().blob_url)

    def add(name: str, seed: int, **shape: Any) -> str:
        directory = write_adapter(pool.folder / "uploads" / name, seed, **shape)
        manifest = intake.inspect(directory)
        for entry in manifest.files:
            blobs.put_file(directory / entry.path, entry.sha256)
        with pool.database.write() as session:
            row, added = adapters.add_adapter(session, manifest, name=name)
        assert added
        return row.id

    return add


@pytest.fixture(name="wait_until")
def _wait_until() -> Callable[..., Any]:
    return wait_until


def has_ended(pid: int) -> bool:
    """Whether the process has ended, reaped or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(name="has_ended")
def _has_ended() -> Callable[[int], bool]:
    return has_ended


@pytest.fixture(name="exists")
def _exists() -> Callable[[int], bool]:
    return exists
