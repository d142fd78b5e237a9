"""Which waiting job runs next, and on which slots: the claim.

Between owners (API keys) the one that holds the fewest devices is served first, and among equals the one that was
served longest ago; so nobody waits behind another's thousand jobs. Inside an owner the order is priority, then age.

Jobs are taken with SKIP LOCKED: claims of several servers go on side by side, and none gives away what another one
does. Only while jobs of an owner wait that may hold so many devices and no more do they queue up, on the rows of the
counters, so that such a limit is exact. One claim takes as many jobs as there are idle slots, in a few statements.

A job that needs several devices gets them on one host. When it is next in line and too few are free, the jobs behind
it may pass for `PATIENCE_SECONDS`; then one server keeps its slots free for it as they become idle.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, or_, select
from sqlalchemy.orm import Session

from storage import database
from storage.conditions import IS_QUEUED, IS_WAITED_FOR, PARKED
from storage.queues import count_claims
from storage.tables import ApiKeyRow, JobAttemptRow, JobEventRow, JobQueueRow, JobRow

PATIENCE_SECONDS = 10.0
WARM_PATIENCE_SECONDS = 30.0
WARM_WINDOW = 16
CLOCK_JUMP = timedelta(
    minutes=10
)  # longer than any back-off: what is "due" later than this was written by another clock
SLOT_TEXT = 40


@dataclass(frozen=True, slots=True)
class SlotOffer:
    """An idle slot: its name, the machine that it is on, its worker's process, and the base models in its memory."""

    name: str
    host: str = ""
    warm: frozenset[str] = frozenset()
    pid: int | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that this server may run on these slots, as attempt number `attempt`, until the lease ends.

    `waited_seconds` is the time since it could first have run in this attempt.
    """

    job_id: str
    attempt: int
    kind: str
    params: dict[str, Any]
    resources: dict[str, Any]
    devices: int = 1
    affinity: str | None = None
    slots: tuple[str, ...] = ()
    waited_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Claims:
    """What a server got; `hold` is the job that it now keeps slots free for."""

    claims: tuple[Claim, ...] = ()
    hold: str | None = None


@dataclass(slots=True)
class _Owner:
    """What the counters say of an owner."""

    name: str
    limit: int | None
    running: int = 0
    served_at: datetime | None = None
    sizes: list[int] = field(default_factory=list)

    def turn(self) -> tuple[int, float, str]:
        return self.running, self.served_at.timestamp() if self.served_at is not None else 0.0, self.name

    def may_run(self, devices: int) -> bool:
        return self.limit is None or self.running + devices <= self.limit


def claim_many(
    session: Session,
    *,
    server_id: str,
    boot_id: str,
    slots: Sequence[SlotOffer],
    lease_seconds: float,
    capacity: Mapping[str, int] | None = None,
    hold: str | None = None,
) -> Claims:
    """Give the idle slots of one server the jobs that are next.

    Args:
        slots: the idle ones.
        capacity: host → number of its slots, idle or not; by default as many as are idle.
        hold: the job that the server has kept slots free for.
    """
    round_ = _Round(session, server_id, boot_id, slots, lease_seconds, capacity)
    return round_.run(hold)


def claim_next(session: Session, *, server_id: str, boot_id: str, slot: str, lease_seconds: float) -> Claim | None:
    """Give one idle slot the next job that needs one device; None if none is due."""
    found = claim_many(
        session, server_id=server_id, boot_id=boot_id, slots=[SlotOffer(slot)], lease_seconds=lease_seconds
    )
    return found.claims[0] if found.claims else None


class _Round:
    """One claim transaction of one server."""

    def __init__(
        self,
        session: Session,
        server_id: str,
        boot_id: str,
        slots: Sequence[SlotOffer],
        lease_seconds: float,
        capacity: Mapping[str, int] | None,
    ) -> None:
        self._session = session
        self._server_id, self._boot_id = server_id, boot_id
        self._lease_seconds = lease_seconds
        self._idle: dict[str, list[SlotOffer]] = defaultdict(list)
        for slot in slots:
            self._idle[slot.host].append(slot)
        self._capacity = capacity or {host: len(found) for host, found in self._idle.items()}
        self._moment = database.now(session)
        self._claims: list[Claim] = []
        self._hold: str | None = None
        self._heads: dict[tuple[str, int], deque[JobRow]] = {}
        self._taken: Counter[tuple[str, int]] = Counter()

    def run(self, hold: str | None) -> Claims:
        with self._session.no_autoflush:  # what was taken is written at the end, all at once
            owners = self._waiting_owners()
            if hold is not None:
                self._serve_held(hold, owners)
            while owners and any(self._idle.values()):
                owner = min(owners, key=_Owner.turn)
                job = self._next_job(owner)
                if job is None:
                    owners.remove(owner)
                    continue
                self._claim(job, owner)
        self._session.flush()
        count_claims(self._session, self._taken, self._moment)
        return Claims(tuple(self._claims), self._hold)

    def _waiting_owners(self) -> list[_Owner]:
        """The owners whose jobs wait. If one has a limit, the counters stay locked until the claims are written."""
        rows = self._counters(lock=False)
        if any(limit is not None for _, limit in rows):
            rows = self._counters(lock=True)
        owners: dict[str, _Owner] = {}
        for row, limit in rows:
            owner = owners.setdefault(row.owner, _Owner(row.owner, limit))
            owner.running += row.running * row.devices
            if row.served_at is not None and (owner.served_at is None or row.served_at > owner.served_at):
                owner.served_at = row.served_at
            if row.queued > 0:
                owner.sizes.append(row.devices)
        return [owner for owner in owners.values() if owner.sizes]

    def _counters(self, *, lock: bool) -> Sequence[tuple[JobQueueRow, int | None]]:
        """The counters of the owners whose jobs wait, with the limit of each; locked in one order for all."""
        waited_for = select(JobQueueRow.owner).where(IS_WAITED_FOR)
        statement = (
            select(JobQueueRow, ApiKeyRow.max_running)
            .outerjoin(ApiKeyRow, ApiKeyRow.id == JobQueueRow.owner)
            .where(JobQueueRow.owner.in_(waited_for))
            .order_by(JobQueueRow.owner, JobQueueRow.devices)
            .execution_options(populate_existing=True)
        )
        if lock:
            statement = statement.with_for_update(of=JobQueueRow)
        return [(row, limit) for row, limit in self._session.execute(statement)]

    def _next_job(self, owner: _Owner) -> JobRow | None:
        """The owner's next job that can run now, locked; may begin to hold slots for one that can not."""
        heads = [head for size in owner.sizes if (head := self._head(owner, size)) is not None]
        heads.sort(key=_place)
        for head in heads:
            if not owner.may_run(head.devices):
                continue
            if self._host_for(head.devices) is not None:
                return self._warmer(head) or head
            self._consider_hold(head)
        return None

    def _head(self, owner: _Owner, devices: int) -> JobRow | None:
        """The next job of that size, of which as many are read and locked at once as could be taken."""
        key = (owner.name, devices)
        if key not in self._heads:
            room = sum(len(slots) for slots in self._idle.values())
            statement = (
                select(JobRow)
                .where(IS_QUEUED, JobRow.owner == owner.name, JobRow.devices == devices, self._is_due())
                .order_by(JobRow.precedence, JobRow.created_at, JobRow.id)
                .limit(max(1, room // devices))
                .with_for_update(skip_locked=True)
                .execution_options(populate_existing=True)
            )
            self._heads[key] = deque(self._session.scalars(statement))
        heads = self._heads[key]
        while heads and heads[0].state != "queued":  # taken in this round
            heads.popleft()
        return heads[0] if heads else None

    def _is_due(self) -> ColumnElement[bool]:
        jumped = and_(JobRow.available_at > self._moment + CLOCK_JUMP, JobRow.available_at < PARKED)
        return or_(JobRow.available_at <= self._moment, jumped)

    def _warmer(self, head: JobRow) -> JobRow | None:
        """A job a little behind the head whose base model an idle slot holds, unless the head has waited long."""
        warm = {model for slots in self._idle.values() for slot in slots for model in slot.warm}
        waited = (self._moment - head.available_at).total_seconds()
        if not warm or head.affinity is None or head.affinity in warm or waited > WARM_PATIENCE_SECONDS:
            return None
        window = (
            select(JobRow.id, JobRow.affinity)
            .where(
                IS_QUEUED,
                JobRow.owner == head.owner,
                JobRow.devices == head.devices,
                JobRow.precedence == head.precedence,
                self._is_due(),
            )
            .order_by(JobRow.created_at, JobRow.id)
            .limit(WARM_WINDOW)
        )
        taken = {claim.job_id for claim in self._claims}
        found = (job_id for job_id, affinity in self._session.execute(window) if affinity in warm)
        chosen = next((job_id for job_id in found if job_id not in taken), None)
        return None if chosen is None else self._lock_queued(chosen)

    def _lock_queued(self, job_id: str) -> JobRow | None:
        return self._session.scalars(
            select(JobRow)
            .where(JobRow.id == job_id, IS_QUEUED)
            .with_for_update(skip_locked=True)
            .execution_options(populate_existing=True)
        ).one_or_none()

    def _host_for(self, devices: int) -> str | None:
        """A host with that many idle slots; the fullest that has them, so that large jobs find room on the others."""
        fitting = [(len(slots), host) for host, slots in self._idle.items() if len(slots) >= devices]
        return min(fitting)[1] if fitting else None

    def _serve_held(self, job_id: str, owners: list[_Owner]) -> None:
        """Run the job that slots were kept free for, or keep them free on."""
        job = self._lock_queued(job_id)
        if job is None or job.held_by != self._server_id:
            return
        owner = next((item for item in owners if item.name == job.owner), None)
        if owner is None or not owner.may_run(job.devices):
            return
        if self._host_for(job.devices) is not None:
            self._claim(job, owner)
        else:
            self._keep_free_for(job)

    def _consider_hold(self, head: JobRow) -> None:
        waited = (self._moment - head.available_at).total_seconds()
        held_elsewhere = (
            head.held_by not in (None, self._server_id)
            and head.held_until is not None
            and self._moment < head.held_until <= self._moment + CLOCK_JUMP
        )
        could = any(slots >= head.devices for slots in self._capacity.values())
        if self._hold is None and could and not held_elsewhere and waited >= PATIENCE_SECONDS:
            self._keep_free_for(head)

    def _keep_free_for(self, job: JobRow) -> None:
        idle = {host: len(self._idle.get(host, ())) for host, slots in self._capacity.items() if slots >= job.devices}
        if not idle:
            return
        self._idle.pop(max(idle, key=lambda host: (idle[host], host)), None)
        job.held_by = self._server_id
        job.held_until = self._moment + timedelta(seconds=self._lease_seconds)
        self._hold = job.id

    def _claim(self, job: JobRow, owner: _Owner) -> None:
        slots = self._take_slots(job)
        moment, name = self._moment, slot_text(slots)
        waited = (moment - min(job.available_at, moment)).total_seconds()
        job.state = "running"
        job.attempt += 1
        job.last_event += 1
        job.server_id, job.boot_id, job.slot = self._server_id, self._boot_id, name
        job.lease_expires_at = moment + timedelta(seconds=self._lease_seconds)
        job.held_by = job.held_until = None
        job.fraction, job.step, job.total, job.message, job.error = 0.0, None, None, "", None
        if job.started_at is None:
            job.started_at = moment
        data = {"state": "running", "attempt": job.attempt, "server": self._server_id, "slot": name}
        self._session.add_all(
            [
                JobAttemptRow(
                    job_id=job.id,
                    attempt=job.attempt,
                    server_id=self._server_id,
                    slot=name,
                    pid=slots[0].pid if len(slots) == 1 else None,  # several slots get a process of their own
                    started_at=moment,
                ),
                JobEventRow(job_id=job.id, sequence=job.last_event, type="state", data=data, created_at=moment),
            ]
        )
        self._taken[job.owner, job.devices] += 1
        owner.running += job.devices
        owner.served_at = moment
        self._claims.append(
            Claim(
                job_id=job.id,
                attempt=job.attempt,
                kind=job.kind,
                params=job.params,
                resources=job.resources,
                devices=job.devices,
                affinity=job.affinity,
                slots=tuple(slot.name for slot in slots),
                waited_seconds=waited,
            )
        )

    def _take_slots(self, job: JobRow) -> list[SlotOffer]:
        """Slots of one host: those that hold the job's base model first, then those that hold the fewest others."""
        warm_hosts = [
            host
            for host, slots in self._idle.items()
            if len(slots) >= job.devices and any(job.affinity in slot.warm for slot in slots)
        ]
        host = warm_hosts[0] if warm_hosts else self._host_for(job.devices)
        assert host is not None
        ranked = sorted(self._idle[host], key=lambda slot: (job.affinity not in slot.warm, len(slot.warm)))
        taken = ranked[: job.devices]
        self._idle[host] = [slot for slot in self._idle[host] if slot not in taken]
        return taken


def _place(job: JobRow) -> tuple[int, datetime, str]:
    return job.precedence, job.created_at, job.id


def slot_text(slots: Sequence[SlotOffer]) -> str:
    """How the slots of an attempt are written down: "cuda:0", or "cuda:0 +3" for four of them."""
    tail = "" if len(slots) == 1 else f" +{len(slots) - 1}"
    return slots[0].name[: SLOT_TEXT - len(tail)] + tail


def waits(session: Session) -> bool:
    """Whether any job is queued."""
    return session.scalar(select(JobQueueRow.owner).where(IS_WAITED_FOR).limit(1)) is not None
