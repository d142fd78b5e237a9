"""Tags know what adapters are filtered by: a tag with other filters is looked through without its adapters.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

import sqlalchemy as sa

from alembic import op
from storage.text import short_digest

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

INSERT = (
    "INSERT INTO adapter_tags (adapter_id, tag, created_at, base_model_digest, model_id, method, name_folded) "
    "SELECT a.id, k.tag, a.created_at, {digest}, a.model_id, a.method, a.name_folded "
    "FROM kept_tags AS k JOIN adapters AS a ON a.id = k.adapter_id ORDER BY a.created_at, a.id"
)


def upgrade() -> None:
    _keep()
    op.create_table(
        "adapter_tags",
        sa.Column("adapter_id", sa.String(48), nullable=False),
        sa.Column("tag", sa.String(200), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("base_model_digest", sa.String(32), nullable=True),
        sa.Column("model_id", sa.String(48), nullable=True),
        sa.Column("method", sa.String(40), nullable=False),
        sa.Column("name_folded", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name="fk_adapter_tags_adapter_id"),
        sa.PrimaryKeyConstraint("adapter_id", "tag", name="pk_adapter_tags"),
    )
    digest = "encode(substring(sha256(convert_to(a.base_model, 'UTF8')) FROM 1 FOR 16), 'hex')"
    connection = op.get_bind()
    if connection.dialect.name == "sqlite":
        digest = "short_digest(a.base_model)"
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.create_function("short_digest", 1, lambda text: None if text is None else short_digest(text))
    op.execute(INSERT.format(digest=digest))
    op.create_index(
        "ix_adapter_tags_tag",
        "adapter_tags",
        ["tag", "created_at", "adapter_id", "base_model_digest", "model_id", "method", "name_folded"],
    )
    op.execute("DROP TABLE kept_tags")


def downgrade() -> None:
    _keep()
    op.create_table(
        "adapter_tags",
        sa.Column("tag", sa.String(200), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("adapter_id", sa.String(48), nullable=False),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name="fk_adapter_tags_adapter_id"),
        sa.PrimaryKeyConstraint("tag", "created_at", "adapter_id", name="pk_adapter_tags"),
    )
    op.execute(
        "INSERT INTO adapter_tags (tag, created_at, adapter_id) SELECT k.tag, a.created_at, a.id "
        "FROM kept_tags AS k JOIN adapters AS a ON a.id = k.adapter_id"
    )
    op.create_index("ix_adapter_tags_adapter_id", "adapter_tags", ["adapter_id"])
    op.execute("DROP TABLE kept_tags")


def _keep() -> None:
    """The tags aside, and their table gone with its names, which the new one takes."""
    op.execute("CREATE TEMPORARY TABLE kept_tags AS SELECT adapter_id, tag FROM adapter_tags")
    op.drop_table("adapter_tags")
