"""Base models know of which class of diffusers' pipelines they are; of those from before it is found in their jobs.

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

import sqlalchemy as sa

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("models", sa.Column("pipeline", sa.String(200), nullable=True))


def downgrade() -> None:
    op.drop_column("models", "pipeline")
