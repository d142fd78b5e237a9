"""Schedules that make a job for each of many adapters, at a pace.

Revision ID: 0013
Revises: 0012
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.add_column("schedules", sa.Column("job_selector", JSON, nullable=True))
    op.add_column("schedules", sa.Column("max_parallel", sa.Integer(), nullable=True))
    op.add_column("schedules", sa.Column("window", JSON, nullable=True))
    op.create_table(
        "firing_items",
        sa.Column("schedule_id", sa.String(48), nullable=False),
        sa.Column("occurrence", sa.String(80), nullable=False),
        sa.Column("adapter_digest", sa.String(64), nullable=False),
        sa.Column("adapter_id", sa.String(48), nullable=False),
        sa.Column("adapter_name", sa.String(200), nullable=False),
        sa.Column("state", sa.String(12), nullable=False),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.Column("job_id", sa.String(48), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["schedule_id", "occurrence"],
            ["schedule_firings.schedule_id", "schedule_firings.occurrence"],
            name=op.f("fk_firing_items_firing"),
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_firing_items_job_id")),
        sa.PrimaryKeyConstraint("schedule_id", "occurrence", "adapter_digest", name=op.f("pk_firing_items")),
    )
    page = ["schedule_id", "occurrence", "created_at", "adapter_id"]
    op.create_index("ix_firing_items_page", "firing_items", page)
    pending = sa.text("state = 'pending'")
    op.create_index(
        "ix_firing_items_pending",
        "firing_items",
        ["schedule_id", "created_at", "adapter_id"],
        sqlite_where=pending,
        postgresql_where=pending,
    )


def downgrade() -> None:
    op.drop_table("firing_items")
    for name in ("window", "max_parallel", "job_selector"):
        op.drop_column("schedules", name)
