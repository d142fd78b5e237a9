"""Domain events: what has happened to the things of the service, for the schedules that wait for it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from storage import database
from storage.ids import new_id
from storage.tables import DomainEventRow
from storage.text import storable

EVENT_TYPES = ("base_model.registered", "base_model.deprecated", "base_model.removed")
"""Every type that is published. The subject of each is the id of the base model."""

_OPEN = text("domain_events.handled_at IS NULL")


def publish(session: Session, event_type: str, subject: str, data: Mapping[str, Any]) -> DomainEventRow:
    """Write that something happened, in the transaction in which it does; schedules see it a moment later.

    Args:
        event_type: one of `EVENT_TYPES`.
        subject: id of what it happened to.
        data: JSON.
    """
    if event_type not in EVENT_TYPES:
        raise AssertionError(f"{event_type!r} is not a type of event")
    event = DomainEventRow(
        id=new_id("evt"),
        type=event_type,
        subject=storable(subject, "/subject", 64),
        data=dict(data),
        created_at=database.now(session),
        handled_at=None,
    )
    session.add(event)
    session.flush()
    return event


def any_open(session: Session) -> bool:
    """Whether an event waits to be handled."""
    return session.scalar(select(DomainEventRow.id).where(_OPEN).limit(1)) is not None


def lock_oldest_open(session: Session) -> DomainEventRow | None:
    """The oldest event that nobody handles now, locked until the transaction ends."""
    return session.scalars(
        select(DomainEventRow)
        .where(_OPEN)
        .order_by(DomainEventRow.created_at, DomainEventRow.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    ).one_or_none()


def close(session: Session, event: DomainEventRow, moment: datetime) -> None:
    """All schedules have seen the event."""
    event.handled_at = moment
    session.flush()
