"""What is known of a dataset beside its columns, the same content only once, and the index of the list.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
LIVE: dict[str, Any] = {
    "sqlite_where": sa.text("deleted_at IS NULL"),
    "postgresql_where": sa.text("deleted_at IS NULL"),
}


def upgrade() -> None:
    with op.batch_alter_table("datasets", schema=None) as batch_op:
        batch_op.add_column(sa.Column("name_folded", sa.Text(), nullable=True))
        batch_op.add_column(sa.Column("tasks", JSON, nullable=True))
        batch_op.add_column(sa.Column("warnings", JSON, nullable=True))
    op.execute("UPDATE datasets SET name_folded = lower(name), tasks = '[]', warnings = '[]'")
    with op.batch_alter_table("datasets", schema=None) as batch_op:
        batch_op.alter_column("name_folded", existing_type=sa.Text(), nullable=False)
        batch_op.alter_column("tasks", existing_type=JSON, nullable=False)
        batch_op.alter_column("warnings", existing_type=JSON, nullable=False)
        batch_op.create_index("uq_datasets_live_content", ["sha256", "format"], unique=True, **LIVE)
        batch_op.create_index("ix_datasets_sha256", ["sha256"], unique=False)
        batch_op.create_index(
            "ix_datasets_created", ["created_at", "id", "name_folded", "deleted_at"], unique=False, **LIVE
        )


def downgrade() -> None:
    with op.batch_alter_table("datasets", schema=None) as batch_op:
        batch_op.drop_index("ix_datasets_created")
        batch_op.drop_index("ix_datasets_sha256")
        batch_op.drop_index("uq_datasets_live_content")
        batch_op.drop_column("warnings")
        batch_op.drop_column("tasks")
        batch_op.drop_column("name_folded")
