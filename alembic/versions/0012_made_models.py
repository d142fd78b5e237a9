"""Models that jobs made, with their files in the blob store.

Revision ID: 0012
Revises: 0011
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "made_models",
        sa.Column("model_id", sa.String(48), nullable=False),
        sa.Column("job_id", sa.String(48), nullable=False),
        sa.Column("recipe", JSON, nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("created_by", sa.String(48), nullable=True),
        sa.ForeignKeyConstraint(["created_by"], ["api_keys.id"], name=op.f("fk_made_models_created_by")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_made_models_job_id")),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_made_models_model_id")),
        sa.PrimaryKeyConstraint("model_id", name=op.f("pk_made_models")),
    )
    op.create_table(
        "model_files",
        sa.Column("model_id", sa.String(48), nullable=False),
        sa.Column("path", sa.String(200), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("media_type", sa.String(100), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["made_models.model_id"], name=op.f("fk_model_files_model_id")),
        sa.ForeignKeyConstraint(["sha256"], ["blobs.sha256"], name=op.f("fk_model_files_sha256")),
        sa.PrimaryKeyConstraint("model_id", "path", name=op.f("pk_model_files")),
    )
    op.create_index("ix_model_files_sha256", "model_files", ["sha256"])


def downgrade() -> None:
    op.drop_table("model_files")
    op.drop_table("made_models")
