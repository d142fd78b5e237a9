"""The tables of what happens by itself: schedules and their firings, domain events, webhooks and their outbox."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Boolean, ForeignKey, ForeignKeyConstraint, Index, Integer, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from storage.columns import Base, partial_index


class ScheduleRow(Base):
    """What is to be run when. `version` counts its changes (ETag). A deleted one keeps its row for its jobs."""

    __tablename__ = "schedules"

    id: Mapped[str] = mapped_column(String(48), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    cron: Mapped[str | None] = mapped_column(String(200))  # either this and `timezone`, or `event`
    timezone: Mapped[str | None] = mapped_column(String(64))
    event: Mapped[str | None] = mapped_column(String(64))
    subject: Mapped[str | None] = mapped_column(String(64))  # only events of this one, e.g. a model's id
    job_kind: Mapped[str] = mapped_column(String(24))
    job_params: Mapped[dict[str, Any]]
    job_resources: Mapped[dict[str, Any]]
    job_selector: Mapped[dict[str, Any] | None]  # of a fleet: a job for each adapter that matches
    max_parallel: Mapped[int | None] = mapped_column(Integer)  # of its jobs that may be unfinished at once
    window: Mapped[dict[str, Any] | None]  # {from, to, timezone}: when its jobs may start
    overlap: Mapped[str] = mapped_column(String(16))  # "skip" | "queue" | "replace"
    misfire: Mapped[str] = mapped_column(String(16))  # "run-once" | "skip"
    enabled: Mapped[bool] = mapped_column(Boolean, default=True)
    next_fire_at: Mapped[datetime | None]  # null: disabled, or started by an event
    version: Mapped[int] = mapped_column(Integer, default=1)
    created_by: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    deleted_at: Mapped[datetime | None]

    __table_args__ = (
        partial_index("ix_schedules_due", "next_fire_at", where="next_fire_at IS NOT NULL"),
        partial_index("ix_schedules_event", "event", where="event IS NOT NULL AND deleted_at IS NULL"),
        partial_index("ix_schedules_created", "created_at", "id", where="deleted_at IS NULL"),
    )


class FiringRow(Base):
    """One firing of a schedule; the key makes it happen once, however many servers see that it is due."""

    __tablename__ = "schedule_firings"

    schedule_id: Mapped[str] = mapped_column(ForeignKey("schedules.id"), primary_key=True)
    occurrence: Mapped[str] = mapped_column(String(80), primary_key=True)  # the fire time, or what else started it
    due_at: Mapped[datetime]
    outcome: Mapped[str] = mapped_column(String(16))  # "job" | "fleet" | "skipped" | "missed" | "refused"
    detail: Mapped[str | None] = mapped_column(Text)
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[datetime]

    __table_args__ = (Index("ix_schedule_firings_created", "schedule_id", "created_at"),)


class FiringItemRow(Base):
    """One adapter of a fleet. The key makes its job once, however often the firing is taken up again."""

    __tablename__ = "firing_items"

    schedule_id: Mapped[str] = mapped_column(String(48), primary_key=True)
    occurrence: Mapped[str] = mapped_column(String(80), primary_key=True)
    adapter_digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    adapter_id: Mapped[str] = mapped_column(String(48))  # no reference: the item outlives a deleted adapter
    adapter_name: Mapped[str] = mapped_column(String(200))
    state: Mapped[str] = mapped_column(String(12))  # "pending" | "job" | "already" | "refused"
    detail: Mapped[str | None] = mapped_column(Text)
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[datetime]  # of the firing

    __table_args__ = (
        ForeignKeyConstraint(
            ["schedule_id", "occurrence"],
            ["schedule_firings.schedule_id", "schedule_firings.occurrence"],
            name="fk_firing_items_firing",
        ),
        Index("ix_firing_items_page", "schedule_id", "occurrence", "created_at", "adapter_id"),
        partial_index("ix_firing_items_pending", "schedule_id", "created_at", "adapter_id", where="state = 'pending'"),
    )


class DomainEventRow(Base):
    """Something that schedules may wait for, e.g. that a base model was deprecated."""

    __tablename__ = "domain_events"

    id: Mapped[str] = mapped_column(String(48), primary_key=True)
    type: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(64))
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
    handled_at: Mapped[datetime | None]

    __table_args__ = (partial_index("ix_domain_events_open", "created_at", where="handled_at IS NULL"),)


class WebhookRow(Base):
    """Where to tell that jobs have ended. The secret signs (Standard Webhooks) and so has to be kept readable."""

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(String(48), primary_key=True)
    url: Mapped[str] = mapped_column(Text)
    secret: Mapped[str] = mapped_column(String(100))
    events: Mapped[list[str]]
    description: Mapped[str] = mapped_column(Text, default="")
    owner: Mapped[str] = mapped_column(String(48))  # told of this owner's jobs only
    enabled: Mapped[bool] = mapped_column(Boolean, default=True)
    created_by: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    created_at: Mapped[datetime]
    deleted_at: Mapped[datetime | None]

    __table_args__ = (partial_index("ix_webhooks_owner", "owner", "created_at", "id", where="deleted_at IS NULL"),)


class WebhookDeliveryRow(Base):
    """The outbox: written with what it tells of, in one transaction; sent, and sent again, by any server."""

    __tablename__ = "webhook_deliveries"

    id: Mapped[str] = mapped_column(String(48), primary_key=True)  # also the message's webhook-id
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id"))
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    event: Mapped[str] = mapped_column(String(40))
    payload: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(12))  # "pending" | "delivered" | "failed"
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    available_at: Mapped[datetime]  # not sent before; a sender moves it on while it tries
    last_status: Mapped[int | None] = mapped_column(Integer)
    last_error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        partial_index("ix_webhook_deliveries_pending", "webhook_id", "available_at", "id", where="state = 'pending'"),
        Index("ix_webhook_deliveries_webhook", "webhook_id", "created_at", "id"),
        Index("ix_webhook_deliveries_state", "webhook_id", "state", "created_at", "id"),
    )
