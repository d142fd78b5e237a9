"""Base models are retired by two dates, each of which does something when it comes; adapters may be waived.

Revision ID: 0010
Revises: 0009
"""

from __future__ import annotations

import sqlalchemy as sa

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_TIMES = ("deprecation_told_at", "remove_at")


def upgrade() -> None:
    for name in _TIMES:
        op.add_column("models", sa.Column(name, sa.DateTime(timezone=True), nullable=True))
    op.add_column("models", sa.Column("successor_id", sa.String(48), nullable=True))
    op.add_column("models", sa.Column("deprecation_reason", sa.Text(), nullable=True))
    # Their events were published when the dates were set.
    op.execute("UPDATE models SET deprecation_told_at = deprecated_at WHERE deprecated_at IS NOT NULL")
    op.execute("UPDATE models SET remove_at = removed_at, removed_at = NULL WHERE removed_at > CURRENT_TIMESTAMP")
    op.create_table(
        "adapter_waivers",
        sa.Column("adapter_id", sa.String(48), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_by", sa.String(48), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name=op.f("fk_adapter_waivers_adapter_id")),
        sa.ForeignKeyConstraint(["created_by"], ["api_keys.id"], name=op.f("fk_adapter_waivers_created_by")),
        sa.PrimaryKeyConstraint("adapter_id", name=op.f("pk_adapter_waivers")),
    )


def downgrade() -> None:
    op.drop_table("adapter_waivers")
    op.execute("UPDATE models SET removed_at = remove_at WHERE removed_at IS NULL AND remove_at IS NOT NULL")
    for name in ("deprecation_reason", "successor_id", *reversed(_TIMES)):
        op.drop_column("models", name)
