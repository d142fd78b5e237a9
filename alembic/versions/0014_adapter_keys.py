"""What became of every key of an uploaded adapter.

Revision ID: 0014
Revises: 0013
"""

from __future__ import annotations

import sqlalchemy as sa

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "adapter_keys",
        sa.Column("adapter_id", sa.String(48), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name=op.f("fk_adapter_keys_adapter_id")),
        sa.PrimaryKeyConstraint("adapter_id", name=op.f("pk_adapter_keys")),
    )


def downgrade() -> None:
    op.drop_table("adapter_keys")
