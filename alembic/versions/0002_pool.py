"""What the pool needs: queues by owner, multi-device jobs, logs, schedules, webhooks, quotas, and indexes of all lists.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def _where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def upgrade() -> None:
    op.create_table(
        "domain_events",
        sa.Column("id", sa.String(length=48), nullable=False),
        sa.Column("type", sa.String(length=64), nullable=False),
        sa.Column("subject", sa.String(length=64), nullable=False),
        sa.Column("data", JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("handled_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_domain_events")),
    )
    with op.batch_alter_table("domain_events", schema=None) as batch_op:
        batch_op.create_index(
            "ix_domain_events_open",
            ["created_at"],
            unique=False,
            **_where("handled_at IS NULL"),
        )

    op.create_table(
        "job_queues",
        sa.Column("owner", sa.String(length=48), nullable=False),
        sa.Column("devices", sa.Integer(), nullable=False),
        sa.Column("queued", sa.Integer(), nullable=False),
        sa.Column("running", sa.Integer(), nullable=False),
        sa.Column("served_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("owner", "devices", name=op.f("pk_job_queues")),
    )
    op.create_table(
        "schedules",
        sa.Column("id", sa.String(length=48), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("cron", sa.String(length=200), nullable=True),
        sa.Column("timezone", sa.String(length=64), nullable=True),
        sa.Column("event", sa.String(length=64), nullable=True),
        sa.Column("subject", sa.String(length=64), nullable=True),
        sa.Column("job_kind", sa.String(length=24), nullable=False),
        sa.Column("job_params", JSON, nullable=False),
        sa.Column("job_resources", JSON, nullable=False),
        sa.Column("overlap", sa.String(length=16), nullable=False),
        sa.Column("misfire", sa.String(length=16), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("next_fire_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_by", sa.String(length=48), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["created_by"], ["api_keys.id"], name=op.f("fk_schedules_created_by")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_schedules")),
    )
    with op.batch_alter_table("schedules", schema=None) as batch_op:
        batch_op.create_index(
            "ix_schedules_created",
            ["created_at", "id"],
            unique=False,
            **_where("deleted_at IS NULL"),
        )
        batch_op.create_index(
            "ix_schedules_due",
            ["next_fire_at"],
            unique=False,
            **_where("next_fire_at IS NOT NULL"),
        )
        batch_op.create_index(
            "ix_schedules_event",
            ["event"],
            unique=False,
            **_where("event IS NOT NULL AND deleted_at IS NULL"),
        )

    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(length=48), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("secret", sa.String(length=100), nullable=False),
        sa.Column("events", JSON, nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("owner", sa.String(length=48), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("created_by", sa.String(length=48), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["created_by"], ["api_keys.id"], name=op.f("fk_webhooks_created_by")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhooks")),
    )
    with op.batch_alter_table("webhooks", schema=None) as batch_op:
        batch_op.create_index(
            "ix_webhooks_owner",
            ["owner", "created_at", "id"],
            unique=False,
            **_where("deleted_at IS NULL"),
        )

    op.create_table(
        "job_logs",
        sa.Column("job_id", sa.String(length=48), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_logs_job_id")),
        sa.PrimaryKeyConstraint("job_id", "attempt", "sequence", name=op.f("pk_job_logs")),
    )
    op.create_table(
        "schedule_firings",
        sa.Column("schedule_id", sa.String(length=48), nullable=False),
        sa.Column("occurrence", sa.String(length=80), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.Column("job_id", sa.String(length=48), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_schedule_firings_job_id")),
        sa.ForeignKeyConstraint(["schedule_id"], ["schedules.id"], name=op.f("fk_schedule_firings_schedule_id")),
        sa.PrimaryKeyConstraint("schedule_id", "occurrence", name=op.f("pk_schedule_firings")),
    )
    with op.batch_alter_table("schedule_firings", schema=None) as batch_op:
        batch_op.create_index("ix_schedule_firings_created", ["schedule_id", "created_at"], unique=False)

    op.create_table(
        "webhook_deliveries",
        sa.Column("id", sa.String(length=48), nullable=False),
        sa.Column("webhook_id", sa.String(length=48), nullable=False),
        sa.Column("job_id", sa.String(length=48), nullable=True),
        sa.Column("event", sa.String(length=40), nullable=False),
        sa.Column("payload", JSON, nullable=False),
        sa.Column("state", sa.String(length=12), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("available_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_status", sa.Integer(), nullable=True),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_webhook_deliveries_job_id")),
        sa.ForeignKeyConstraint(["webhook_id"], ["webhooks.id"], name=op.f("fk_webhook_deliveries_webhook_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_deliveries")),
    )
    with op.batch_alter_table("webhook_deliveries", schema=None) as batch_op:
        batch_op.create_index(
            "ix_webhook_deliveries_pending",
            ["webhook_id", "available_at", "id"],
            unique=False,
            **_where("state = 'pending'"),
        )
        batch_op.create_index("ix_webhook_deliveries_webhook", ["webhook_id", "created_at", "id"], unique=False)
        batch_op.create_index("ix_webhook_deliveries_state", ["webhook_id", "state", "created_at", "id"], unique=False)

    op.create_table(
        "adapter_tags",
        sa.Column("tag", sa.String(length=200), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("adapter_id", sa.String(length=48), nullable=False),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name=op.f("fk_adapter_tags_adapter_id")),
        sa.PrimaryKeyConstraint("tag", "created_at", "adapter_id", name=op.f("pk_adapter_tags")),
    )
    with op.batch_alter_table("adapter_tags", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_adapter_tags_adapter_id"), ["adapter_id"], unique=False)

    op.drop_index("ix_adapters_created", table_name="adapters")
    with op.batch_alter_table("adapters", schema=None) as batch_op:
        batch_op.create_index(
            "ix_adapters_created",
            ["created_at", "id"],
            unique=False,
            **_where("deleted_at IS NULL"),
        )
        batch_op.create_index(
            "ix_adapters_base_model",
            ["base_model", "created_at", "id"],
            unique=False,
            **_where("deleted_at IS NULL"),
        )
        batch_op.create_index(
            "ix_adapters_method",
            ["method", "created_at", "id"],
            unique=False,
            **_where("deleted_at IS NULL"),
        )
        batch_op.create_index(
            "ix_adapters_model_id",
            ["model_id", "created_at", "id"],
            unique=False,
            **_where("deleted_at IS NULL"),
        )

    with op.batch_alter_table("api_keys", schema=None) as batch_op:
        batch_op.add_column(sa.Column("max_queued", sa.Integer(), nullable=True))
        batch_op.add_column(sa.Column("max_running", sa.Integer(), nullable=True))
        batch_op.add_column(sa.Column("max_bytes", sa.BigInteger(), nullable=True))
        batch_op.add_column(sa.Column("stored_bytes", sa.BigInteger(), nullable=False, server_default="0"))

    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("owner", sa.String(length=48), nullable=False, server_default="anonymous"))
        batch_op.add_column(sa.Column("devices", sa.Integer(), nullable=False, server_default="1"))
        batch_op.add_column(sa.Column("precedence", sa.Integer(), nullable=False, server_default="0"))
        batch_op.add_column(sa.Column("affinity", sa.String(length=64), nullable=True))
        batch_op.add_column(sa.Column("restarts", sa.Integer(), nullable=False, server_default="0"))
        batch_op.add_column(sa.Column("held_by", sa.String(length=48), nullable=True))
        batch_op.add_column(sa.Column("held_until", sa.DateTime(timezone=True), nullable=True))
        batch_op.add_column(sa.Column("schedule_id", sa.String(length=48), nullable=True))
        batch_op.drop_index(batch_op.f("ix_jobs_claim"))
        batch_op.create_index(
            "ix_jobs_active",
            ["server_id", "lease_expires_at"],
            unique=False,
            **_where("state IN ('running', 'cancelling')"),
        )
        batch_op.create_index("ix_jobs_kind", ["kind", "created_at", "id"], unique=False)
        batch_op.create_index("ix_jobs_kind_state", ["kind", "state", "created_at", "id"], unique=False)
        batch_op.create_index(
            "ix_jobs_schedule",
            ["schedule_id", "created_at", "id"],
            unique=False,
            **_where("schedule_id IS NOT NULL AND state IN ('queued', 'running', 'cancelling')"),
        )
        batch_op.create_index("ix_jobs_state", ["state", "created_at", "id"], unique=False)
        batch_op.create_foreign_key(batch_op.f("fk_jobs_schedule_id"), "schedules", ["schedule_id"], ["id"])

    with op.batch_alter_table("servers", schema=None) as batch_op:
        batch_op.add_column(sa.Column("pool", sa.String(length=16), nullable=False, server_default="local"))
    op.execute("UPDATE jobs SET precedence = -priority WHERE priority <> 0")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_column("priority")
    op.create_index(
        "ix_jobs_queue",
        "jobs",
        ["owner", "devices", "precedence", "created_at", "id"],
        **_where("state = 'queued'"),
    )
    _fill()


def _fill() -> None:
    """What the new tables and columns say of the rows that were there before."""
    op.execute("UPDATE jobs SET owner = created_by WHERE created_by IS NOT NULL")
    op.execute(
        "INSERT INTO job_queues (owner, devices, queued, running) SELECT owner, devices, "
        "SUM(CASE WHEN state = 'queued' THEN 1 ELSE 0 END), SUM(CASE WHEN state = 'queued' THEN 0 ELSE 1 END) "
        "FROM jobs WHERE state IN ('queued', 'running', 'cancelling') GROUP BY owner, devices"
    )
    if op.get_bind().dialect.name == "sqlite":
        tags = "SELECT DISTINCT t.value, a.created_at, a.id FROM adapters a, json_each(a.tags) t"
    else:
        tags = "SELECT DISTINCT t.value, a.created_at, a.id FROM adapters a, jsonb_array_elements_text(a.tags) t"
    op.execute(f"INSERT INTO adapter_tags (tag, created_at, adapter_id) {tags}")
    op.execute(
        "UPDATE api_keys SET stored_bytes = (SELECT COALESCE(SUM(a.size), 0) FROM adapters a "
        "WHERE a.created_by = api_keys.id AND a.deleted_at IS NULL)"
    )


def downgrade() -> None:
    with op.batch_alter_table("servers", schema=None) as batch_op:
        batch_op.drop_column("pool")

    op.drop_index("ix_jobs_queue", table_name="jobs")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("priority", sa.Integer(), nullable=False, server_default="0"))
    op.execute("UPDATE jobs SET priority = -precedence WHERE precedence <> 0")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_constraint(batch_op.f("fk_jobs_schedule_id"), type_="foreignkey")
        batch_op.drop_index("ix_jobs_state")
        batch_op.drop_index(
            "ix_jobs_schedule",
            **_where("schedule_id IS NOT NULL AND state IN ('queued', 'running', 'cancelling')"),
        )
        batch_op.drop_index("ix_jobs_kind_state")
        batch_op.drop_index("ix_jobs_kind")
        batch_op.drop_index(
            "ix_jobs_active",
            **_where("state IN ('running', 'cancelling')"),
        )
        batch_op.create_index(batch_op.f("ix_jobs_claim"), ["state", "priority", "created_at", "id"], unique=False)
        batch_op.drop_column("schedule_id")
        batch_op.drop_column("held_until")
        batch_op.drop_column("held_by")
        batch_op.drop_column("restarts")
        batch_op.drop_column("affinity")
        batch_op.drop_column("precedence")
        batch_op.drop_column("devices")
        batch_op.drop_column("owner")

    with op.batch_alter_table("api_keys", schema=None) as batch_op:
        batch_op.drop_column("stored_bytes")
        batch_op.drop_column("max_bytes")
        batch_op.drop_column("max_running")
        batch_op.drop_column("max_queued")

    op.drop_index("ix_adapters_created", table_name="adapters")
    op.create_index("ix_adapters_created", "adapters", ["created_at", "id"])
    with op.batch_alter_table("adapters", schema=None) as batch_op:
        batch_op.drop_index(
            "ix_adapters_model_id",
            **_where("deleted_at IS NULL"),
        )
        batch_op.drop_index(
            "ix_adapters_method",
            **_where("deleted_at IS NULL"),
        )
        batch_op.drop_index(
            "ix_adapters_base_model",
            **_where("deleted_at IS NULL"),
        )

    with op.batch_alter_table("adapter_tags", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_adapter_tags_adapter_id"))

    op.drop_table("adapter_tags")
    with op.batch_alter_table("webhook_deliveries", schema=None) as batch_op:
        batch_op.drop_index("ix_webhook_deliveries_state")
        batch_op.drop_index("ix_webhook_deliveries_webhook")
        batch_op.drop_index(
            "ix_webhook_deliveries_pending",
            **_where("state = 'pending'"),
        )

    op.drop_table("webhook_deliveries")
    with op.batch_alter_table("schedule_firings", schema=None) as batch_op:
        batch_op.drop_index("ix_schedule_firings_created")

    op.drop_table("schedule_firings")
    op.drop_table("job_logs")
    with op.batch_alter_table("webhooks", schema=None) as batch_op:
        batch_op.drop_index(
            "ix_webhooks_owner",
            **_where("deleted_at IS NULL"),
        )

    op.drop_table("webhooks")
    with op.batch_alter_table("schedules", schema=None) as batch_op:
        batch_op.drop_index(
            "ix_schedules_event",
            **_where("event IS NOT NULL AND deleted_at IS NULL"),
        )
        batch_op.drop_index(
            "ix_schedules_due",
            **_where("next_fire_at IS NOT NULL"),
        )
        batch_op.drop_index(
            "ix_schedules_created",
            **_where("deleted_at IS NULL"),
        )

    op.drop_table("schedules")
    op.drop_table("job_queues")
    with op.batch_alter_table("domain_events", schema=None) as batch_op:
        batch_op.drop_index(
            "ix_domain_events_open",
            **_where("handled_at IS NULL"),
        )

    op.drop_table("domain_events")
