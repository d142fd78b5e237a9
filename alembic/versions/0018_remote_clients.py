"""Clients of federated trainings that train on machines of their own: no job does their steps.

Revision ID: 0018
Revises: 0017
"""

from __future__ import annotations

import sqlalchemy as sa

from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("client_updates") as batch:
        batch.alter_column("child_id", existing_type=sa.String(48), nullable=True)


def downgrade() -> None:
    op.execute("DELETE FROM client_updates WHERE child_id IS NULL")
    with op.batch_alter_table("client_updates") as batch:
        batch.alter_column("child_id", existing_type=sa.String(48), nullable=False)
