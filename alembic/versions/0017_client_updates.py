"""What the clients of federated trainings give in each round.

Revision ID: 0017
Revises: 0016
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "client_updates",
        sa.Column("job_id", sa.String(48), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("client", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(12), nullable=False),
        sa.Column("child_id", sa.String(48), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=True),
        sa.Column("details", JSON, nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("deadline", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_client_updates_job_id")),
        sa.ForeignKeyConstraint(["child_id"], ["jobs.id"], name=op.f("fk_client_updates_child_id")),
        sa.ForeignKeyConstraint(["sha256"], ["blobs.sha256"], name=op.f("fk_client_updates_sha256")),
        sa.PrimaryKeyConstraint("job_id", "round", "client", name=op.f("pk_client_updates")),
    )
    op.create_index("ix_client_updates_child_id", "client_updates", ["child_id"])
    op.create_index("ix_client_updates_sha256", "client_updates", ["sha256"])
    op.create_index(
        "ix_client_updates_pending",
        "client_updates",
        ["job_id", "round"],
        sqlite_where=sa.text("state = 'pending'"),
        postgresql_where=sa.text("state = 'pending'"),
    )


def downgrade() -> None:
    op.drop_table("client_updates")
