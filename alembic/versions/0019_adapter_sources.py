"""Where adapters that were fetched came from.

Revision ID: 0019
Revises: 0018
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.add_column("adapters", sa.Column("source", JSON, nullable=True))


def downgrade() -> None:
    op.drop_column("adapters", "source")  # no batch: that would replace the table, and lose its triggers on SQLite
