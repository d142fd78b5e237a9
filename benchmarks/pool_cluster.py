"""A cluster that does not exist, under the real supervisor and the real claims: are a thousand slots kept busy?

Several supervisors, each a process with its share of the slots, serve one PostgreSQL. The jobs sleep for given times.
The busy share counts only the time that jobs sleep: all that the pool needs between two jobs counts against it.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg
from sqlalchemy import func, select

from benchmarks import pool_rows
from benchmarks.pool_fakes import FakeProvider, Run
from benchmarks.pool_figures import Figure, median, percentile
from benchmarks.pool_service import ROOT, migrated, postgres, quiet_logs, scratch_folder
from storage.database import Database
from storage.ids import new_id
from storage.tables import JobQueueRow, JobRow
from workers.observer import Unobserved
from workers.supervisor import PoolSettings, Supervisor

BUSY_GOAL = 95.0
PAUSE_SECONDS = 0.1
OWNERS = 20
SPREAD = 0.5  # the times of the jobs lie this share below and above their mean
STALL_SECONDS = 120.0
ACTIVITY = (
    "SELECT CASE WHEN state = 'active' THEN COALESCE(wait_event_type || ': ' || wait_event, 'works') "
    "ELSE 'waits for its client' END, count(*) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid() AND state <> 'idle' GROUP BY 1"
)


@dataclass(frozen=True, slots=True)
class Cluster:
    """How large it is, and its work: `seconds` is the mean time of a job."""

    slots: int
    jobs: int
    seconds: float
    supervisors: int


def cluster(size: Cluster) -> list[Figure]:
    """The busy share of the slots from when each has had a job until no job waits any more."""
    found = simulate(size)
    runs: Sequence[Run] = found["runs"]
    first = {slot: min(begun for own, _, begun, _ in runs if own == slot) for slot in {run[0] for run in runs}}
    if len(first) != size.slots:
        raise RuntimeError(f"only {len(first)} of {size.slots} slots had a job: more jobs are needed")
    opens, closes = max(first.values()), max(begun for _, _, begun, _ in runs)
    if closes <= opens:
        raise RuntimeError("the last job began before every slot had one: more jobs are needed")
    slept = sum(max(0.0, min(ended, closes) - max(begun, opens)) for _, _, begun, ended in runs)
    gaps = _gaps(runs, opens, closes)
    detail = _explain(size, found) | {"window_seconds": closes - opens, "ramp_seconds": opens - min(first.values())}
    detail |= {"gap_median_ms": median(gaps) * 1e3, "gap_p99_ms": percentile(gaps, 0.99) * 1e3}
    return [
        Figure("busy slots", 100 * slept / (size.slots * (closes - opens)), "%", BUSY_GOAL, False, detail),
        Figure("between two jobs of a slot, median", median(gaps) * 1e3, "ms"),
        *_cpu_figures(detail),
    ]


def saturation(size: Cluster) -> list[Figure]:
    """Jobs so short that the slots never stop asking: how many go through, and what is then at its limit."""
    found = simulate(size)
    detail = _explain(size, found)
    return [
        Figure("most jobs through the pool", detail["jobs_per_second"], "jobs/s", detail=detail),
        *_cpu_figures(detail),
    ]


def _cpu_figures(detail: dict[str, Any]) -> list[Figure]:
    return [
        Figure("CPU, busiest supervisor thread", detail["busiest_supervisor_thread"] * 100, "%"),
        Figure("CPU of all supervisors", detail["supervisors_cores"], "cores"),
        Figure("CPU of the workers that write results", detail["workers_cores"], "cores"),
        Figure("CPU of PostgreSQL", detail["postgres_cores"], "cores"),
        Figure("transactions", detail["transactions_per_second"], "per s"),
    ]


def _explain(size: Cluster, found: dict[str, Any]) -> dict[str, Any]:
    seconds = found["seconds"]
    took = [value for report in found["reports"] for value in report["claim_seconds"]]
    return {
        "slots": size.slots,
        "jobs": size.jobs,
        "mean_job_seconds": size.seconds,
        "supervisors": size.supervisors,
        "seconds": seconds,
        "jobs_per_second": size.jobs / seconds,
        "busiest_supervisor_thread": max(report["thread_seconds"] for report in found["reports"]) / seconds,
        "supervisors_cores": sum(report["process_seconds"] for report in found["reports"]) / seconds,
        "workers_cores": sum(report["workers_seconds"] for report in found["reports"]) / seconds,
        "postgres_cores": found["postgres_seconds"] / seconds,
        "transactions_per_second": found["transactions"] / seconds,
        "claim_median_ms": median(took) * 1e3,
        "claim_p99_ms": percentile(took, 0.99) * 1e3,
        "jobs_per_claim": size.jobs / max(len(took), 1),
        "connections_in_a_transaction": found["waits"],
    }


def _gaps(runs: Sequence[Run], opens: float, closes: float) -> list[float]:
    """Seconds in which a slot slept no job, between two that it did."""
    by_slot: dict[str, list[tuple[float, float]]] = {}
    for slot, _, begun, ended in runs:
        by_slot.setdefault(slot, []).append((begun, ended))
    return [
        following[0] - before[1]
        for spans in by_slot.values()
        for before, following in zip(sorted(spans), sorted(spans)[1:], strict=False)
        if opens <= before[1] and following[0] <= closes
    ] or [0.0]


def simulate(size: Cluster) -> dict[str, Any]:
    """Run all jobs to their end. Gives the runs, what each supervisor tells of itself, and what PostgreSQL did."""
    with scratch_folder() as folder, postgres() as url, migrated(url) as database:
        _fill(database, size)
        share, rest = divmod(size.slots, size.supervisors)
        slots = [share + (number < rest) for number in range(size.supervisors)]
        with _supervisors(folder, url, slots) as processes:
            before, began = _postgres_work(url), time.monotonic()
            for process in processes:
                _tell(process, "go")
            waits = _await_end(database, size.jobs, url)
            seconds = time.monotonic() - began
            after = _postgres_work(url)
            reports = [json.loads(_tell(process, "stop", answer=True)) for process in processes]
        with database.read() as session:
            counts = session.execute(select(JobRow.state, func.count()).group_by(JobRow.state))
            states = {state: number for state, number in counts}  # noqa: C416 - a result is no mapping
    runs = [(f"{index}/{slot}", *rest) for index, report in enumerate(reports) for slot, *rest in report["runs"]]
    ran = Counter(job_id for _, job_id, _, _ in runs)
    if states != {"succeeded": size.jobs} or len(ran) != size.jobs or max(ran.values()) != 1:
        raise RuntimeError(f"not every job ran once and succeeded: {states}, {len(ran)} jobs, {len(runs)} runs")
    return {
        "runs": runs,
        "reports": reports,
        "seconds": seconds,
        "waits": waits,
        "postgres_seconds": after[0] - before[0],
        "transactions": after[1] - before[1],
    }


def _fill(database: Database, size: Cluster) -> None:
    choice = random.Random(0)
    made = pool_rows.moment(0)
    ids = [new_id("job") for _ in range(size.jobs)]
    columns = (
        "id", "kind", "owner", "devices", "params", "resources", "state", "precedence", "attempt", "failures",
        "restarts", "available_at", "cancel_requested", "fraction", "message", "last_event", "created_at",
    )  # fmt: skip

    def rows() -> Iterator[Sequence[Any]]:
        for number, job_id in enumerate(ids):
            seconds = size.seconds * (1 - SPREAD + 2 * SPREAD * choice.random())
            params, owner = json.dumps({"seconds": round(seconds, 3)}), f"owner-{number % OWNERS}"
            yield (job_id, "sleep", owner, 1, params, "{}", "queued", 0, 0, 0, 0, made, False, 0.0, "", 1, made)

    event = json.dumps({"state": "queued", "attempt": 0})
    waiting = Counter(f"owner-{number % OWNERS}" for number in range(size.jobs))
    pool_rows.load_tables(
        database,
        [
            ("jobs", columns, rows()),
            (
                "job_events",
                ("job_id", "sequence", "type", "data", "created_at"),
                ((i, 1, "state", event, made) for i in ids),
            ),
            ("job_queues", ("owner", "devices", "queued", "running"), ((o, 1, n, 0) for o, n in waiting.items())),
        ],
    )


def _await_end(database: Database, count: int, url: str) -> dict[str, float]:
    """Gives what the connections in a transaction did on average: their numbers by what they waited for."""
    ended, changed = 0, time.monotonic()
    samples, seen = 0, Counter[str]()
    with psycopg.connect(url, autocommit=True) as connection:
        while ended < count:
            time.sleep(PAUSE_SECONDS)
            seen.update(dict(connection.execute(ACTIVITY).fetchall()))
            samples += 1
            with database.read() as session:
                statement = select(func.sum(JobQueueRow.queued + JobQueueRow.running))
                found = count - (session.scalar(statement) or 0)
            if found != ended:
                ended, changed = found, time.monotonic()
            elif time.monotonic() - changed > STALL_SECONDS:
                raise RuntimeError(f"{ended} of {count} jobs have ended, and no more do")
    return {name: number / samples for name, number in seen.most_common()}


def _postgres_work(url: str) -> tuple[float, int]:
    """CPU seconds of all its processes that live, and transactions, so far."""
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT (SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'), "
            "(SELECT xact_commit FROM pg_stat_database WHERE datname = current_database())"
        ).fetchone()
    assert row is not None
    postmaster = psutil.Process(row[0]).parent()
    assert postmaster is not None
    return sum(_cpu_seconds(process) for process in (postmaster, *postmaster.children())), int(row[1])


def _cpu_seconds(process: psutil.Process) -> float:
    """0 for one that has ended since it was listed."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


@contextmanager
def _supervisors(folder: Path, url: str, slots: Sequence[int]) -> Iterator[list[subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "benchmarks.pool_cluster", str(folder), url]
    processes = [
        subprocess.Popen(
            [*command, f"srv_{number}", str(count)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for number, count in enumerate(slots)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError("a supervisor did not start")
        yield processes
    finally:
        for process in processes:  # the end of its input ends it, too
            process.communicate(timeout=120)


def _tell(process: subprocess.Popen[str], word: str, *, answer: bool = False) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{word}\n")
    process.stdin.flush()
    return process.stdout.readline() if answer else ""


class ClaimTimes(Unobserved):
    """Keeps how long each claim took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def claim_took(self, seconds: float) -> None:
        self.seconds.append(seconds)


def supervise(folder: Path, url: str, server_id: str, slots: int) -> None:
    """One supervisor: begins at the first line of the standard input, and tells of itself at the second."""
    quiet_logs()
    times = ClaimTimes()
    provider = FakeProvider(slots, url)
    settings = PoolSettings(
        server_id=server_id,
        database_url=url,
        blob_url=(folder / "blobs").as_uri(),
        data_dir=folder / server_id,
        kinds={"sleep": "benchmarks.pool_cluster:nothing"},
    )
    supervisor = Supervisor(settings, provider, observer=times)
    print("ready", flush=True)
    sys.stdin.readline()
    supervisor.start()
    sys.stdin.readline()
    own, workers = psutil.Process().cpu_times(), psutil.Process(provider.machine.pid).cpu_times()
    thread = next(item for item in threading.enumerate() if item.name == "supervisor")
    used = next(item for item in psutil.Process().threads() if item.id == thread.native_id)
    supervisor.stop()
    provider.close()
    report = {
        "claim_seconds": times.seconds,
        "thread_seconds": used.user_time + used.system_time,
        "process_seconds": own.user + own.system,
        "workers_seconds": workers.user + workers.system,
        "runs": provider.machine.runs,
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    supervise(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
