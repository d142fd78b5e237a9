"""What adapters keep of their training for transfers, and inputs of jobs that only a worker reads.

Revision ID: 0009
Revises: 0008
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "transferables",
        sa.Column("adapter_id", sa.String(48), nullable=False),
        sa.Column("seeds", JSON, nullable=False),
        sa.Column("task", sa.String(200), nullable=False),
        sa.Column("prompt_format", JSON, nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("recipe", JSON, nullable=False),
        sa.Column("discriminator_digest", sa.String(64), nullable=False),
        sa.Column("discriminator_base", JSON, nullable=False),
        sa.Column("auc", sa.Float(), nullable=False),
        sa.Column("settings", JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name=op.f("fk_transferables_adapter_id")),
        sa.PrimaryKeyConstraint("adapter_id", name=op.f("pk_transferables")),
    )
    op.create_table(
        "transferable_files",
        sa.Column("adapter_id", sa.String(48), nullable=False),
        sa.Column("path", sa.String(300), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("media_type", sa.String(100), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["transferables.adapter_id"], name=op.f("fk_transferable_files_adapter_id")
        ),
        sa.ForeignKeyConstraint(["sha256"], ["blobs.sha256"], name=op.f("fk_transferable_files_sha256")),
        sa.PrimaryKeyConstraint("adapter_id", "path", name=op.f("pk_transferable_files")),
    )
    op.create_index("ix_transferable_files_sha256", "transferable_files", ["sha256"])
    op.create_table(
        "sealed_inputs",
        sa.Column("job_id", sa.String(48), nullable=False),
        sa.Column("document", JSON, nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_sealed_inputs_job_id")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_sealed_inputs")),
    )


def downgrade() -> None:
    op.drop_table("sealed_inputs")
    op.drop_table("transferable_files")
    op.drop_table("transferables")
