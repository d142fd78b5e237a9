"""What happens by itself in a round, and what must be true of it: schedules fire once, every end is told once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from chaos_invariants import Violation
from sqlalchemy import select
from sqlalchemy.orm import Session

from storage import domain_events, schedules, webhooks
from storage.blobs import BlobStore
from storage.schedules import JobTemplate, Trigger
from storage.tables import (
    TERMINAL_STATES,
    AdapterRow,
    DomainEventRow,
    FiringRow,
    JobAttemptRow,
    JobRow,
    ScheduleRow,
    WebhookDeliveryRow,
)

EVENT = "base_model.deprecated"


def set_up(session: Session, merge: Mapping[str, Any]) -> None:
    """A schedule for every event, one for every minute, and a webhook that nobody listens to."""
    job = JobTemplate("merge", {**merge, "name": "by schedule"}, {})
    schedules.create_schedule(session, Trigger(event=EVENT), job, overlap="queue")
    schedules.create_schedule(session, Trigger(cron="* * * * *"), job, overlap="replace")
    webhooks.create_webhook(session, "https://localhost:9/", ["*"])


def publish(session: Session, number: int) -> None:
    """Something that the first schedule waits for."""
    domain_events.publish(session, EVENT, f"mdl_{number}", {})


def stop_schedules(session: Session) -> None:
    """From now on no schedule fires: what is still to be seen must not change any more."""
    for row in session.scalars(select(ScheduleRow).with_for_update()):
        row.enabled, row.next_fire_at = False, None


def all_handled(session: Session) -> bool:
    return not domain_events.any_open(session)


def check_firings(session: Session) -> list[Violation]:
    """Every event has started one job, every firing that made a job names it, and no job came from nowhere."""
    by_event = session.scalars(select(ScheduleRow).where(ScheduleRow.event == EVENT)).one()
    firings = session.scalars(select(FiringRow)).all()
    fired = {firing.occurrence for firing in firings if firing.schedule_id == by_event.id and firing.outcome == "job"}
    events = set(session.scalars(select(DomainEventRow.id)))
    found = [Violation("an event fires once", f"{event} made no job") for event in sorted(events - fired)]
    made = Counter(firing.job_id for firing in firings if firing.outcome == "job")
    jobs = {job.id: job for job in session.scalars(select(JobRow).where(JobRow.schedule_id.is_not(None)))}
    for job_id in sorted(jobs.keys() | made.keys(), key=str):
        if made[job_id] != 1 or job_id not in jobs:
            detail = f"{made[job_id]} firings name it; its row is {'there' if job_id in jobs else 'missing'}"
            found.append(Violation("a firing makes one job", detail, job_id))
    return found


def check_messages(session: Session) -> list[Violation]:
    """One message for every job that has ended, of its end."""
    told: dict[str | None, list[str]] = {}
    for row in session.scalars(select(WebhookDeliveryRow)):
        told.setdefault(row.job_id, []).append(row.event)
    return [
        Violation("every end is told once", f"it is {job.state}, told was {told.get(job.id, [])}", job.id)
        for job in session.scalars(select(JobRow).where(JobRow.state.in_(TERMINAL_STATES)))
        if told.get(job.id, []) != [f"job.{job.state}"]
    ]


def check_scheduled_results(session: Session) -> list[Violation]:
    """The jobs of a schedule all make the same adapter: it is there once, and all that succeeded name it."""
    jobs = session.scalars(select(JobRow).where(JobRow.schedule_id.is_not(None), JobRow.state == "succeeded")).all()
    named = {tuple(job.result["adapters"]) for job in jobs if job.result is not None}
    if not jobs:
        return []
    if len(named) != 1:
        return [Violation("equal content is one adapter", f"jobs of one schedule made {sorted(named)}")]
    (adapters,) = named
    rows = session.scalars(select(AdapterRow).where(AdapterRow.id.in_(adapters))).all()
    if len(adapters) != 1 or len(rows) != 1 or rows[0].job_id not in {job.id for job in jobs}:
        return [Violation("equal content is one adapter", f"{adapters}, made by {[row.job_id for row in rows]}")]
    return []


def check_logs(session: Session, blobs: BlobStore, chatty: Sequence[str]) -> list[Violation]:
    """The log of a job that printed and was not disturbed is kept whole."""
    found = []
    for job_id in chatty:
        job = session.get_one(JobRow, job_id)
        attempt = session.get_one(JobAttemptRow, (job_id, job.attempt))
        last = f"{job_id} line {job.params['lines'] - 1}\n"
        text = b"".join(blobs.stream(attempt.log_sha256)).decode() if attempt.log_sha256 is not None else ""
        if last not in text or "written past Python\n" not in text:
            found.append(Violation("logs are kept", f"{attempt.log_sha256}: {text[-200:]!r}", job_id))
    return found
