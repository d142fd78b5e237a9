"""Names that point to adapters, with their switches.

Revision ID: 0015
Revises: 0014
"""

from __future__ import annotations

import sqlalchemy as sa

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "aliases",
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("adapter_id", sa.String(48), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_by", sa.String(48), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name=op.f("fk_aliases_adapter_id")),
        sa.ForeignKeyConstraint(["created_by"], ["api_keys.id"], name=op.f("fk_aliases_created_by")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_aliases")),
    )
    op.create_index("ix_aliases_adapter_id", "aliases", ["adapter_id"])
    op.create_index("ix_aliases_created", "aliases", ["created_at", "name"])
    op.create_table(
        "alias_switches",
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("adapter_id", sa.String(48), nullable=False),
        sa.Column("job_id", sa.String(48), nullable=True),
        sa.Column("created_by", sa.String(48), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["name"], ["aliases.name"], name=op.f("fk_alias_switches_name")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_alias_switches_job_id")),
        sa.ForeignKeyConstraint(["created_by"], ["api_keys.id"], name=op.f("fk_alias_switches_created_by")),
        sa.PrimaryKeyConstraint("name", "version", name=op.f("pk_alias_switches")),
    )


def downgrade() -> None:
    op.drop_table("alias_switches")
    op.drop_table("aliases")
