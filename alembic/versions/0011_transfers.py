"""Transfers of adapters, and the files of those that wait for a decision.

Revision ID: 0011
Revises: 0010
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "transfers",
        sa.Column("job_id", sa.String(48), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("request_key", sa.String(64), nullable=False),
        sa.Column("superseded_by", sa.String(48), nullable=True),
        sa.Column("adapter_id", sa.String(48), nullable=False),
        sa.Column("adapter_name", sa.String(200), nullable=False),
        sa.Column("source_model", sa.String(48), nullable=False),
        sa.Column("target_model", sa.String(48), nullable=False),
        sa.Column("method", sa.String(40), nullable=False),
        sa.Column("schedule_id", sa.String(48), nullable=True),
        sa.Column("seeds_digest", sa.String(64), nullable=True),
        sa.Column("verdict", sa.String(12), nullable=True),
        sa.Column("degraded", sa.Boolean(), nullable=False),
        sa.Column("new_adapter", sa.String(48), nullable=True),
        sa.Column("held", JSON, nullable=True),
        sa.Column("decision", sa.String(12), nullable=True),
        sa.Column("decided_by", sa.String(48), nullable=True),
        sa.Column("decided_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_transfers_job_id")),
        sa.ForeignKeyConstraint(["source_model"], ["models.id"], name=op.f("fk_transfers_source_model")),
        sa.ForeignKeyConstraint(["target_model"], ["models.id"], name=op.f("fk_transfers_target_model")),
        sa.ForeignKeyConstraint(["schedule_id"], ["schedules.id"], name=op.f("fk_transfers_schedule_id")),
        sa.ForeignKeyConstraint(["decided_by"], ["api_keys.id"], name=op.f("fk_transfers_decided_by")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_transfers")),
    )
    live = sa.text("superseded_by IS NULL")
    op.create_index(
        "uq_transfers_request_key",
        "transfers",
        ["request_key"],
        unique=True,
        sqlite_where=live,
        postgresql_where=live,
    )
    op.create_index("ix_transfers_created", "transfers", ["created_at", "job_id"])
    op.create_index("ix_transfers_adapter", "transfers", ["adapter_id", "created_at", "job_id"])
    op.create_index("ix_transfers_source_model", "transfers", ["source_model", "created_at", "job_id"])
    op.create_index("ix_transfers_target_model", "transfers", ["target_model", "created_at", "job_id"])
    op.create_index("ix_transfers_verdict", "transfers", ["verdict", "created_at", "job_id"])
    scheduled = sa.text("schedule_id IS NOT NULL")
    op.create_index(
        "ix_transfers_schedule",
        "transfers",
        ["schedule_id", "created_at", "job_id"],
        sqlite_where=scheduled,
        postgresql_where=scheduled,
    )
    op.create_table(
        "held_files",
        sa.Column("job_id", sa.String(48), nullable=False),
        sa.Column("path", sa.String(300), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("media_type", sa.String(100), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["transfers.job_id"], name=op.f("fk_held_files_job_id")),
        sa.ForeignKeyConstraint(["sha256"], ["blobs.sha256"], name=op.f("fk_held_files_sha256")),
        sa.PrimaryKeyConstraint("job_id", "path", name=op.f("pk_held_files")),
    )
    op.create_index("ix_held_files_sha256", "held_files", ["sha256"])


def downgrade() -> None:
    op.drop_table("held_files")
    op.drop_table("transfers")
