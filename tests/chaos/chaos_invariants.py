"""What must be true of the rows, the blobs and the folders after a round, whatever was killed in it.

Each check gives the violations that it finds; none stops at the first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage.blobs import BlobStore
from storage.claims import MAX_FAILURES, MAX_RESTARTS
from storage.tables import (
    TERMINAL_STATES,
    AdapterFileRow,
    AdapterRow,
    BlobRow,
    JobAttemptRow,
    JobEventRow,
    JobLogRow,
    JobQueueRow,
    JobRow,
)
from workers.failures import PEER_LOST

# What may end a job although nothing is wrong with it: its surroundings failed again and again.
SURROUNDINGS = {
    "worker_crashed",
    "worker_interrupted",
    "lease_expired",
    "server_killed",
    PEER_LOST,
    "disk_full",
    "database_unavailable",
    "blob_store_unavailable",
}
_NEXT = {
    None: {"queued"},
    "queued": {"running", "cancelled"},
    "running": {"queued", "cancelling", "succeeded", "failed"},
    "cancelling": {"cancelled"},
}


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise; `job_id` is None when no single job is to blame."""

    rule: str
    detail: str
    job_id: str | None = None

    def __str__(self) -> str:
        return f"{self.rule}: {self.detail}" + (f" ({self.job_id})" if self.job_id else "")


@dataclass(frozen=True, slots=True)
class Expected:
    """What a job that nothing happened to ends as."""

    state: str
    code: str | None = None  # of its error
    failures: int = 0  # at least


def check_rows(session: Session) -> list[Violation]:
    """All that the rows alone can tell."""
    jobs = session.scalars(select(JobRow)).all()
    events: dict[str, list[JobEventRow]] = defaultdict(list)
    for event in session.scalars(select(JobEventRow).order_by(JobEventRow.job_id, JobEventRow.sequence)):
        events[event.job_id].append(event)
    attempts: dict[str, list[JobAttemptRow]] = defaultdict(list)
    for attempt in session.scalars(select(JobAttemptRow).order_by(JobAttemptRow.job_id, JobAttemptRow.attempt)):
        attempts[attempt.job_id].append(attempt)
    made: dict[str | None, list[str]] = defaultdict(list)
    for adapter_id, job_id in session.execute(select(AdapterRow.id, AdapterRow.job_id)):
        made[job_id].append(adapter_id)
    found: list[Violation] = []
    for job in jobs:
        found += _check_state(job)
        found += _check_events(job, events[job.id])
        found += _check_attempts(job, attempts[job.id])
        found += _check_results(job, made[job.id])
    found += _check_queues(jobs, session.scalars(select(JobQueueRow)).all())
    for job_id, attempt in session.execute(select(JobLogRow.job_id, JobLogRow.attempt).distinct()):
        found.append(Violation("the log of an ended attempt is a blob", f"pieces of attempt {attempt}", job_id))
    return found


def _check_state(job: JobRow) -> Iterator[Violation]:
    if job.state not in TERMINAL_STATES:
        yield Violation("every job ends", f"it is {job.state}", job.id)
        return
    held = {
        name: value
        for name in ("lease_expires_at", "boot_id", "slot", "held_by", "held_until")
        if (value := getattr(job, name)) is not None
    }
    if held:
        yield Violation("no lease without a live holder", f"it has ended and still holds {held}", job.id)
    if job.finished_at is None:
        yield Violation("every job ends", "it has no time of its end", job.id)
    if job.cancel_requested != (job.state == "cancelled"):
        asked = "asked" if job.cancel_requested else "never asked"
        yield Violation("a cancelled job is cancelled", f"a cancel was {asked} for and it is {job.state}", job.id)
    if (job.error is not None) != (job.state == "failed"):
        yield Violation("an error belongs to a failed job", f"it is {job.state} with the error {job.error}", job.id)
    if job.state == "failed" and job.error is not None and job.error["code"] == "internal_error":
        yield Violation("no job meets a bug", str(job.error), job.id)


def _check_events(job: JobRow, events: Sequence[JobEventRow]) -> Iterator[Violation]:
    sequences = [event.sequence for event in events]
    if sequences != list(range(1, len(sequences) + 1)) or job.last_event != len(sequences):
        detail = f"the newest is {job.last_event}, there are {sequences}"
        yield Violation("event sequences have no gaps", detail, job.id)
    states = [event.data["state"] for event in events if event.type == "state"]
    for before, after in pairwise([None, *states]):
        if after not in _NEXT.get(before, ()):
            yield Violation("terminal states never change", f"from {before} to {after} in {states}", job.id)
    if not states or states[-1] != job.state:
        yield Violation("every change has its event", f"it is {job.state}, its events tell {states}", job.id)
    if job.state in TERMINAL_STATES and events and events[-1].type != "state":
        yield Violation("terminal states never change", f"{events[-1].type} {events[-1].data} after its end", job.id)
    current = 0
    for event in events:
        current += event.data.get("state") == "running"
        if event.data.get("attempt", current) != current:
            yield Violation("a stale attempt writes nothing", f"{event.data} in attempt {current}", job.id)
    if states.count("running") != job.attempt:
        yield Violation("every attempt is told", f"{job.attempt} attempts, its events tell {states}", job.id)


def _check_attempts(job: JobRow, attempts: Sequence[JobAttemptRow]) -> Iterator[Violation]:
    numbers = [attempt.attempt for attempt in attempts]
    if numbers != list(range(1, job.attempt + 1)):
        yield Violation("every attempt has a row", f"attempt {job.attempt}, rows {numbers}", job.id)
    outcomes = [attempt.outcome for attempt in attempts]
    if outcomes.count("succeeded") != int(job.state == "succeeded"):
        yield Violation("no job publishes twice", f"it is {job.state}, its attempts ended as {outcomes}", job.id)
    if any(attempt.outcome is None or attempt.finished_at is None for attempt in attempts):
        yield Violation("every attempt ends", f"its attempts ended as {outcomes}", job.id)


def _check_results(job: JobRow, made: Sequence[str]) -> Iterator[Violation]:
    if job.schedule_id is not None:
        return  # such jobs all make the same adapter, which has one row: `chaos_outbox` looks at them
    author = job.result["report"].get("attempt", job.attempt) if job.result is not None else job.attempt
    if author != job.attempt:
        detail = f"the result is of attempt {author}, the current one was {job.attempt}"
        yield Violation("a stale attempt writes nothing", detail, job.id)
    told = list(job.result["adapters"]) if job.result is not None else []
    if sorted(told) != sorted(made):
        yield Violation("no job publishes twice", f"its result names {told}, the rows say {list(made)}", job.id)
    if (job.result is not None) != (job.state == "succeeded"):
        yield Violation("a result belongs to success", f"it is {job.state} with the result {job.result}", job.id)
    if job.kind == "merge" and job.state == "succeeded" and len(made) != 1:
        yield Violation("no job publishes twice", f"a merge made {list(made)}", job.id)


def _check_queues(jobs: Iterable[JobRow], queues: Iterable[JobQueueRow]) -> Iterator[Violation]:
    counted: Counter[tuple[str, int, str]] = Counter()
    for job in jobs:
        if job.state not in TERMINAL_STATES:
            counted[job.owner, job.devices, "queued" if job.state == "queued" else "running"] += 1
    kept: Counter[tuple[str, int, str]] = Counter()
    for queue in queues:
        kept[queue.owner, queue.devices, "queued"] += queue.queued
        kept[queue.owner, queue.devices, "running"] += queue.running
    for key in sorted(set(counted) | set(kept)):
        if counted[key] != kept[key]:
            yield Violation("the counters of the queue are true", f"{key}: kept {kept[key]}, counted {counted[key]}")


def check_outcome(job: JobRow, expected: Expected, *, calm: bool) -> Iterator[Violation]:
    """Whether the job ended as it should.

    Args:
        calm: nobody cancelled it and nothing was killed while it ran.
    """
    code = job.error["code"] if job.error is not None else None
    # On a machine that is very busy a lease can end although nothing was killed, which is one failure more.
    same_code = code == expected.code or (code in SURROUNDINGS and expected.code in SURROUNDINGS)
    if job.state == expected.state and same_code and (not calm or job.failures >= expected.failures):
        return
    if not calm and job.state == "cancelled":
        return  # that it was asked for is checked with its state
    if not calm and job.state == "failed" and code in SURROUNDINGS and _gave_up(job):
        return
    detail = f"a {job.kind} ended as {job.state} {code} after {job.attempt} attempts, {job.failures} failures"
    yield Violation("a job ends as its cause says", f"{detail}; expected {expected}: {job.error}", job.id)


def _gave_up(job: JobRow) -> bool:
    return job.failures > MAX_FAILURES or job.restarts > MAX_RESTARTS


def check_blobs(session: Session, blobs: BlobStore) -> list[Violation]:
    """After a sweep of everything: a row for each blob, and a blob for each row."""
    stored = {blob.sha256: blob.size for blob in blobs.iter_blobs()}
    rows = {row.sha256: row.size for row in session.scalars(select(BlobRow))}
    found = [Violation("no blob without a row", sha256) for sha256 in sorted(stored.keys() - rows.keys())]
    found += [Violation("no row without its blob", sha256) for sha256 in sorted(rows.keys() - stored.keys())]
    found += [
        Violation("no row without its blob", f"{sha256} has {stored[sha256]} bytes, its row says {rows[sha256]}")
        for sha256 in sorted(rows.keys() & stored.keys())
        if stored[sha256] != rows[sha256]
    ]
    for file in session.scalars(select(AdapterFileRow)):
        if stored.get(file.sha256) != file.size:
            found.append(Violation("no row without its blob", f"{file.adapter_id} {file.path}: {file.sha256}"))
    for attempt in session.scalars(select(JobAttemptRow).where(JobAttemptRow.log_sha256.is_not(None))):
        if attempt.log_sha256 not in stored:
            detail = f"the log of attempt {attempt.attempt}: {attempt.log_sha256}"
            found.append(Violation("no row without its blob", detail, attempt.job_id))
    return found


def check_folders(data_dirs: Iterable[Path], locks: Path) -> list[Violation]:
    """Scratch folders are empty, logs are gone, and no two processes were on one slot."""
    found = [
        Violation("scratch folders are empty", str(path))
        for data_dir in data_dirs
        for path in sorted((data_dir / "work").glob("*/*"))
        if path.name != "logs" or any(path.iterdir())
    ]
    found += [Violation("one process on a slot", path.stem) for path in sorted(locks.glob("*.conflict"))]
    return found
