"""How quickly a job begins, how many jobs go through one slot, and whether any is ever given away twice."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
from sqlalchemy import func, select

from benchmarks.pool_figures import Figure, median, percentile
from benchmarks.pool_service import NOOP_KINDS, ROOT, database_url, migrated, quiet_logs, scratch_folder, service
from storage import jobs
from storage.database import Database
from storage.tables import JobAttemptRow, JobRow
from workers.devices import parse_devices
from workers.local import LocalProvider
from workers.provider import WorkerProvider
from workers.supervisor import PoolSettings, Supervisor

LATENCY_GOAL_MS = 60.0
RATE_GOAL = 25.0
CLIENTS = 4
PAUSE_SECONDS = 0.02
WARM_UP = 5
DEADLINE_SECONDS = 600.0
TERMINAL = ("succeeded", "failed", "cancelled")


def latency(pool: str, count: int) -> list[Figure]:
    """From the call that creates a job to the first line of the job's function in a warm worker, one job at a time."""
    with (
        scratch_folder() as folder,
        database_url("sqlite", folder) as url,
        migrated(url) as database,
        _provider(pool, folder) as provider,
    ):
        supervisor = Supervisor(_settings(folder, url, "srv_bench"), provider)
        supervisor.start()
        try:
            _await_idle(supervisor)
            waits = [_begin_one(database, supervisor) for _ in range(count + WARM_UP)][WARM_UP:]
        finally:
            supervisor.stop()
    detail = {"jobs": count, "p99_ms": percentile(waits, 0.99), "max_ms": max(waits), "database": "sqlite"}
    return [Figure(f"submit to running, {pool}", median(waits), "ms", LATENCY_GOAL_MS, detail=detail)]


def _begin_one(database: Database, supervisor: Supervisor) -> float:
    submitted = time.monotonic()
    with database.write() as session:
        job_id = jobs.create_job(session, "noop", {}).id
    supervisor.wake()
    deadline = submitted + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        with database.read() as session:
            job = jobs.get_job(session, job_id)
        if job.state == "succeeded":
            assert job.result is not None
            _await_idle(supervisor)
            return (job.result["report"]["began"] - submitted) * 1e3
        if job.state in TERMINAL:
            raise RuntimeError(f"{job_id} ended as {job.state}: {job.error}")
        time.sleep(PAUSE_SECONDS)
    raise RuntimeError(f"{job_id} has not ended")


@contextmanager
def _provider(pool: str, folder: Path) -> Iterator[WorkerProvider]:
    if pool == "ray":
        from benchmarks.pool_ray import ray_provider

        with ray_provider(folder) as provider:
            yield provider
        return
    local = LocalProvider(parse_devices("cpu:1"), threads=1)
    try:
        yield local
    finally:
        local.close()


def _settings(folder: Path, url: str, server_id: str) -> PoolSettings:
    return PoolSettings(
        server_id=server_id,
        database_url=url,
        blob_url=(folder / "blobs").as_uri(),
        data_dir=folder / server_id,
        devices="cpu:1",
        kinds=NOOP_KINDS,
    )


def _await_idle(supervisor: Supervisor) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (slots := supervisor.status()) or any(slot["state"] != "idle" for slot in slots):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the slots are not idle: {slots}")
        time.sleep(PAUSE_SECONDS)


def throughput(kind: str, count: int) -> list[Figure]:
    """Jobs that do nothing, through the HTTP interface and one local slot, from the first call to the last end."""
    with scratch_folder() as folder, database_url(kind, folder) as url:
        settings = {"DEVICES": "cpu:1", "MAX_QUEUED_JOBS": str(count + 100), "BLOB_URL": (folder / "blobs").as_uri()}
        with service(folder, url, settings) as (address, _), httpx.Client(base_url=address, timeout=60) as client:
            began = time.monotonic()
            with ThreadPoolExecutor(CLIENTS) as pool:
                ids = list(pool.map(lambda _: _submit(client), range(count)))
            submitted = time.monotonic()
            _await_empty(client)
            ended = time.monotonic()
            states = Counter(_states(client))
        if len(set(ids)) != count or states != {"succeeded": count}:
            raise RuntimeError(f"{count} jobs were submitted as {len(set(ids))}, and ended as {dict(states)}")
    detail = {"jobs": count, "seconds": ended - began, "submitting_seconds": submitted - began, "clients": CLIENTS}
    return [Figure(f"one slot over HTTP, {kind}", count / (ended - began), "jobs/s", RATE_GOAL, False, detail)]


def _submit(client: httpx.Client) -> str:
    answer = client.post("/noop")
    answer.raise_for_status()
    return str(answer.json()["id"])


def _await_empty(client: httpx.Client) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while any(
        client.get("/jobs", params={"state": state, "limit": 1}).json()["items"] for state in ("queued", "running")
    ):
        if time.monotonic() > deadline:
            raise RuntimeError("the queue is not empty")
        time.sleep(0.1)


def _states(client: httpx.Client) -> Iterator[str]:
    cursor: str | None = None
    while True:
        page = client.get("/jobs", params={"limit": 200} | ({"cursor": cursor} if cursor else {})).json()
        yield from (job["state"] for job in page["items"])
        cursor = page["next"]
        if cursor is None:
            return


def double_claims(count: int, supervisors: int = 4) -> list[Figure]:
    """Several supervisors, in processes of their own, on one PostgreSQL: is any job run twice?

    Looked for in two places: in the attempts of the jobs, and in a file to which every run appends a line.
    """
    with scratch_folder() as folder, database_url("postgresql", folder) as url, migrated(url) as database:
        ledger = folder / "ledger"
        with _supervisors(folder, url, supervisors):
            began = time.monotonic()
            for _ in range(0, count, 100):
                with database.write() as session:
                    for _ in range(min(100, count)):
                        jobs.create_job(session, "noop", {"ledger": str(ledger)}, max_queued=count + 1)
            _await_terminal(database, count)
            seconds = time.monotonic() - began
        with database.read() as session:
            counts = session.execute(select(JobRow.state, func.count()).group_by(JobRow.state))
            states = {state: number for state, number in counts}  # noqa: C416 - a result is no mapping
            attempts = session.execute(select(JobAttemptRow.job_id, JobAttemptRow.server_id)).all()
        runs = Counter(line.split()[0] for line in ledger.read_text().splitlines())
    twice = sum(number - 1 for number in runs.values())
    attempts_twice = len(attempts) - len({job_id for job_id, _ in attempts})
    detail = {
        "jobs": count,
        "states": states,
        "runs": sum(runs.values()),
        "attempts": len(attempts),
        "attempts_by_server": dict(Counter(server for _, server in attempts)),
        "jobs_per_second": count / seconds,
    }
    if states != {"succeeded": count} or len(runs) != count:
        raise RuntimeError(f"not every job ran and succeeded: {detail}")
    return [
        Figure(f"jobs run twice, {supervisors} supervisors", twice, "jobs", 0, detail=detail),
        Figure(f"jobs claimed twice, {supervisors} supervisors", attempts_twice, "jobs", 0),
        Figure(f"rate, {supervisors} supervisors on PostgreSQL", count / seconds, "jobs/s"),
    ]


def _await_terminal(database: Database, count: int) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        with database.read() as session:
            found = session.scalar(select(func.count()).select_from(JobRow).where(JobRow.state.in_(TERMINAL)))
        if found == count:
            return
        time.sleep(0.2)
    raise RuntimeError(f"{found} of {count} jobs have ended")


@contextmanager
def _supervisors(folder: Path, url: str, count: int) -> Iterator[None]:
    command = [sys.executable, "-m", "benchmarks.pool_throughput", str(folder), url]
    processes = [
        subprocess.Popen(
            [*command, f"srv_{number}"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for number in range(count)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError("a supervisor did not start")
        yield
    finally:
        for process in processes:
            process.communicate("stop\n", timeout=60)


def supervise(folder: Path, url: str, server_id: str) -> None:
    """One supervisor with one local slot, until a line comes on the standard input."""
    quiet_logs()
    provider = LocalProvider(parse_devices("cpu:1"), preload=("workers.runtime", "benchmarks.pool_service"), threads=1)
    supervisor = Supervisor(_settings(folder, url, server_id), provider)
    supervisor.start()
    _await_idle(supervisor)
    print("ready", flush=True)
    sys.stdin.readline()
    supervisor.stop()
    provider.close()


if __name__ == "__main__":
    supervise(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
