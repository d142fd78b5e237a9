"""What the database knows of the service as a whole: the numbers that are watched."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from storage import database, job_logs
from storage.automation_tables import ScheduleRow, WebhookDeliveryRow
from storage.conditions import IS_ACTIVE
from storage.tables import BlobRow, JobQueueRow, JobRow, ServerRow

_IS_DUE_SOMETIME = text("schedules.next_fire_at IS NOT NULL")
_IS_PENDING = text("webhook_deliveries.state = 'pending'")
DELIVERY_STATES = ("pending", "delivered", "failed")


@dataclass(frozen=True, slots=True)
class Figures:
    """What is cheap to know, however large the tables are. Ages are in seconds, 0 when there is nothing of the kind.

    Attributes:
        slots: (device, state) → number, of the servers that are alive.
        busy_seconds: (server id, device) → seconds that slots have been held since the server was started.
        lease_age: since the last renewal of the active lease that was renewed longest ago.
        queue_age: since the oldest job that waits was created.
        schedule_lag: since the earliest schedule that has not fired was due.
        delivery_lag: since the earliest webhook delivery that was not made was due.
    """

    queued: int = 0
    running: int = 0
    owners_waiting: int = 0
    servers: int = 0
    slots: Mapping[tuple[str, str], int] = field(default_factory=dict)
    busy_seconds: Mapping[tuple[str, str], float] = field(default_factory=dict)
    lease_age: float = 0.0
    queue_age: float = 0.0
    schedule_lag: float = 0.0
    delivery_lag: float = 0.0


@dataclass(frozen=True, slots=True)
class StoredFigures:
    """What takes a walk through whole tables.

    Attributes:
        live_log_size: characters of log pieces that are in the database.
        deliveries: state → number, of the webhook deliveries that are not forgotten yet.
    """

    blobs: int
    blob_bytes: int
    live_log_size: int
    deliveries: Mapping[str, int]


def figures(session: Session, servers: Sequence[ServerRow], lease_seconds: float) -> Figures:
    """See `Figures`.

    Args:
        servers: those that are alive.
        lease_seconds: how long a lease is when it is renewed.
    """
    moment = database.now(session)
    queued, running = session.execute(
        select(func.coalesce(func.sum(JobQueueRow.queued), 0), func.coalesce(func.sum(JobQueueRow.running), 0))
    ).one()
    owners = session.scalar(select(func.count(JobQueueRow.owner.distinct())).where(text("job_queues.queued > 0")))
    lease_ends = session.scalar(select(func.min(JobRow.lease_expires_at)).where(IS_ACTIVE))
    oldest = session.scalar(
        select(JobRow.created_at).where(JobRow.state == "queued").order_by(JobRow.created_at, JobRow.id).limit(1)
    )
    due = session.scalar(select(func.min(ScheduleRow.next_fire_at)).where(_IS_DUE_SOMETIME))
    pending = session.scalar(select(func.min(WebhookDeliveryRow.available_at)).where(_IS_PENDING))
    return Figures(
        queued=int(queued),
        running=int(running),
        owners_waiting=owners or 0,
        servers=len(servers),
        slots=_slots(servers),
        busy_seconds=_busy_seconds(servers),
        lease_age=0.0 if lease_ends is None else max(0.0, lease_seconds - (lease_ends - moment).total_seconds()),
        queue_age=_age(oldest, moment),
        schedule_lag=_age(due, moment),
        delivery_lag=_age(pending, moment),
    )


def stored_figures(session: Session) -> StoredFigures:
    """See `StoredFigures`."""
    blobs, blob_bytes = session.execute(select(func.count(), func.coalesce(func.sum(BlobRow.size), 0))).one()
    counted = dict.fromkeys(DELIVERY_STATES, 0)
    rows = session.execute(select(WebhookDeliveryRow.state, func.count()).group_by(WebhookDeliveryRow.state))
    for state, number in rows:
        counted[state] = number
    return StoredFigures(int(blobs), int(blob_bytes), job_logs.live_bytes(session), counted)


def _slots(servers: Iterable[ServerRow]) -> Mapping[tuple[str, str], int]:
    return Counter(
        (str(slot.get("device", "")), str(slot.get("state", "idle"))) for row in servers for slot in _slots_of(row)
    )


def _busy_seconds(servers: Iterable[ServerRow]) -> Mapping[tuple[str, str], float]:
    held: defaultdict[tuple[str, str], float] = defaultdict(float)
    for row in servers:
        for slot in _slots_of(row):
            held[row.id, str(slot.get("device", ""))] += float(slot.get("busy_seconds", 0.0))
    return held


def _slots_of(row: ServerRow) -> Sequence[Mapping[str, Any]]:
    return row.slots


def _age(since: datetime | None, moment: datetime) -> float:
    return 0.0 if since is None else max(0.0, (moment - since).total_seconds())
