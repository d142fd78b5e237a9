"""What lies ahead of a job: its place in the queue, why it waits, and when it will be done.

All of it is an estimate from counters and a few bounded queries; its cost does not grow with the tables.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Select, func, literal, select, tuple_
from sqlalchemy.orm import Session

from storage import database, queues
from storage.columns import UtcDateTime
from storage.conditions import AWAITING, IS_QUEUED, IS_WAITED_FOR, PARKED
from storage.history import run_times, seconds_left
from storage.servers import list_servers
from storage.tables import ApiKeyRow, JobAttemptRow, JobQueueRow, JobRow

LOOK_AHEAD = 10_000
SAMPLE = 200

WaitReason = Literal[
    "back_off", "no_server", "quota", "held", "devices", "slots_busy", "starting", "next", "window", "clients"
]


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why a job waits, as a word and as a sentence."""

    reason: WaitReason
    detail: str


@dataclass(frozen=True, slots=True)
class Outlook:
    """What lies ahead of a job; all None once it has ended.

    Attributes:
        position: 1 is served next; None also when more than `LOOK_AHEAD` jobs of its owner are ahead.
        eta_seconds: until it ends; None when nothing meaningful can be said.
    """

    position: int | None = None
    waiting: Waiting | None = None
    eta_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class _Pool:
    """The slots of all servers that are alive: host → state → number."""

    servers: int
    hosts: Mapping[str, Counter[str]]

    @property
    def slots(self) -> int:
        return sum(states.total() for states in self.hosts.values())

    def count(self, state: str) -> int:
        return sum(states[state] for states in self.hosts.values())

    @property
    def largest_host(self) -> int:
        return max((states.total() for states in self.hosts.values()), default=0)

    @property
    def most_idle(self) -> int:
        return max((states["idle"] for states in self.hosts.values()), default=0)


def outlook_of(session: Session, job: JobRow, alive_within: float) -> Outlook:
    """See `Outlook`.

    A running job's time is `history.seconds_left`. A queued one's is the wait, plus the median of its kind. The wait
    for k slots to become free (k = jobs ahead − free slots + 1) is (k − ½) · d̄ / slots, where d̄ is the mean, over the
    oldest `SAMPLE` jobs that wait, of devices × the median run time of their kind. It is None when the job backs off,
    needs several devices, is over its key's limit or has no server to run it, and when a kind that waits has too
    little history.

    Args:
        alive_within: seconds since a server's last sign of life, after which it does not count.
    """
    if job.state == "running":
        return Outlook(eta_seconds=_running_eta(session, job))
    if job.state != "queued":
        return Outlook()
    ahead = _own_ahead(session, job)
    position = None if ahead is None else 1 + ahead + _others_ahead(session, job, ahead)
    pool = _pool(session, alive_within)
    used = _devices_in_use(session)
    waiting = _waiting(session, job, position, pool, pool.slots - used)
    eta = None
    if waiting.reason in ("slots_busy", "starting", "next") and job.devices == 1 and position is not None:
        eta = _queued_eta(session, job, position, pool, pool.slots - used)
    return Outlook(position, waiting, eta)


def position_of(session: Session, job: JobRow) -> int | None:
    """The job's estimated place in the fair order; None if it does not wait, or too far behind to tell.

    Owners take turns, so ahead of a job with n others of its owner ahead go at most n + 1 of each other owner. With
    one owner the place is exact.
    """
    ahead = _own_ahead(session, job) if job.state == "queued" else None
    return None if ahead is None else 1 + ahead + _others_ahead(session, job, ahead)


def ahead_statement(job: JobRow, devices: int, limit: int) -> Select[int]:
    """Counts the jobs of its owner that need so many devices and go before it, up to `limit`: a range of one index."""
    place = tuple_(JobRow.precedence, JobRow.created_at, JobRow.id)
    own = tuple_(literal(job.precedence), literal(job.created_at, UtcDateTime()), literal(job.id))
    ahead = (
        select(literal(1))
        .select_from(JobRow)
        .where(IS_QUEUED, JobRow.owner == job.owner, JobRow.devices == devices, place < own)
        .limit(limit)
    )
    return select(func.count()).select_from(ahead.subquery())


def _own_ahead(session: Session, job: JobRow) -> int | None:
    sizes = session.scalars(select(JobQueueRow.devices).where(JobQueueRow.owner == job.owner, IS_WAITED_FOR)).all()
    ahead = 0
    for devices in sizes:
        ahead += session.scalar(ahead_statement(job, devices, LOOK_AHEAD + 1 - ahead)) or 0
        if ahead > LOOK_AHEAD:
            return None
    return ahead


def _others_ahead(session: Session, job: JobRow, own_ahead: int) -> int:
    queued = session.scalars(
        select(func.sum(JobQueueRow.queued))
        .where(JobQueueRow.owner != job.owner, IS_WAITED_FOR)
        .group_by(JobQueueRow.owner)
    )
    return sum(min(number, own_ahead + 1) for number in queued)


def _devices_in_use(session: Session) -> int:
    return session.scalar(select(func.coalesce(func.sum(JobQueueRow.running * JobQueueRow.devices), 0))) or 0


def _pool(session: Session, alive_within: float) -> _Pool:
    servers = list_servers(session, alive_within)
    hosts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for server in servers:
        slots: Iterable[Mapping[str, Any]] = server.slots
        for slot in slots:
            # A worker tells its host once it runs; until then the server's own stands for it.
            hosts[slot.get("host") or server.host][str(slot.get("state", "idle"))] += 1
    return _Pool(len(servers), hosts)


def _waiting(session: Session, job: JobRow, position: int | None, pool: _Pool, free: int) -> Waiting:
    moment = database.now(session)
    if job.available_at >= AWAITING:
        return Waiting("clients", "Its clients are at work: GET /jobs/{id}/rounds tells which.")
    if job.available_at >= PARKED:
        return Waiting("window", f"The window of its schedule {job.schedule_id} is closed.")
    if job.available_at > moment:
        return Waiting("back_off", f"It is tried again at {_stamp(job.available_at)}, after a failure.")
    if not pool.servers or not pool.slots:
        return Waiting("no_server", "No server with device slots gives a sign of life.")
    limit = _key_limit(session, job)
    held = queues.running_devices_of(session, job.owner) if limit is not None else 0
    if limit is not None and held + job.devices > limit:
        return Waiting("quota", f"Jobs of its API key hold {held} device slots; at most {limit} are allowed.")
    if job.devices > pool.largest_host:
        detail = f"It needs {job.devices} devices of one host; the largest host has {pool.largest_host}."
        return Waiting("devices", detail)
    if job.held_by is not None and job.held_until is not None and job.held_until > moment:
        detail = f"Server {job.held_by} keeps slots free for it until {job.devices} are idle on one host."
        return Waiting("held", detail)
    ahead = f"more than {LOOK_AHEAD}" if position is None else str(position - 1)
    if free <= 0:
        return Waiting("slots_busy", f"All {pool.slots} slots are busy; jobs ahead: {ahead}.")
    if not pool.count("idle") and pool.count("starting"):
        return Waiting("starting", f"{pool.count('starting')} workers are starting; jobs ahead: {ahead}.")
    if job.devices > 1 and job.devices > pool.most_idle:
        detail = f"It needs {job.devices} devices of one host; the most that are idle on one are {pool.most_idle}."
        return Waiting("devices", detail)
    return Waiting("next", f"A server takes it as soon as it looks; jobs ahead: {ahead}.")


def _key_limit(session: Session, job: JobRow) -> int | None:
    return session.scalar(select(ApiKeyRow.max_running).where(ApiKeyRow.id == job.owner))


def _running_eta(session: Session, job: JobRow) -> float | None:
    started_at = session.scalar(
        select(JobAttemptRow.started_at).where(JobAttemptRow.job_id == job.id, JobAttemptRow.attempt == job.attempt)
    )
    if started_at is None:
        return None
    elapsed = max(0.0, (database.now(session) - started_at).total_seconds())
    return _rounded(seconds_left(job.fraction, elapsed, run_times(session, job.kind)))


def _queued_eta(session: Session, job: JobRow, position: int, pool: _Pool, free: int) -> float | None:
    own = run_times(session, job.kind)
    per_job = _mean_slot_seconds(session)
    if own is None or per_job is None:
        return None
    needed = position - max(0, free)
    wait = max(0.0, needed - 0.5) * per_job / pool.slots if needed > 0 else 0.0
    return _rounded(wait + own.median)


def _mean_slot_seconds(session: Session) -> float | None:
    oldest = (
        select(JobRow.kind, JobRow.devices)
        .where(JobRow.state == "queued")
        .order_by(JobRow.created_at, JobRow.id)
        .limit(SAMPLE)
        .subquery()
    )
    rows = session.execute(
        select(oldest.c.kind, func.count(), func.sum(oldest.c.devices)).group_by(oldest.c.kind)
    ).all()
    total = 0.0
    for kind, _, devices in rows:
        history = run_times(session, kind)
        if history is None:
            return None
        total += devices * history.median
    jobs = sum(number for _, number, _ in rows)
    return total / jobs if jobs else None


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def _stamp(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")
