"""Indexes in the order of the lists: of adapters by digest and by any part of the name.

An adapter's name is indexed by its pieces of three characters: on SQLite in an FTS5 table that triggers keep, on
PostgreSQL in a GIN index over a function of ours, which needs no extension. Neither is in the metadata of the tables.
A later migration that replaces the table `adapters` on SQLite has to create the triggers again.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

LIVE: dict[str, Any] = {
    "sqlite_where": sa.text("deleted_at IS NULL"),
    "postgresql_where": sa.text("deleted_at IS NULL"),
}

INDEXES = {
    "created": ("created_at", "id", "name_folded"),
    "base_model": ("base_model", "created_at", "id", "method", "name_folded"),
    "model_id": ("model_id", "created_at", "id", "method", "name_folded"),
    "method": ("method", "created_at", "id", "base_model", "model_id", "name_folded"),
    "weights_digest": ("weights_digest", "created_at", "id"),
}
# Two characters that no query has follow the name, so that its last ones begin a piece of three as well.
SQLITE = (
    (
        "CREATE TABLE adapter_names (number INTEGER PRIMARY KEY, adapter_id VARCHAR(48) NOT NULL UNIQUE, "
        "created_at DATETIME NOT NULL, name_folded TEXT NOT NULL)"
    ),
    (
        "CREATE VIRTUAL TABLE adapter_name_grams USING fts5("
        "name, content='', columnsize=0, detail='none', tokenize='trigram case_sensitive 1')"
    ),
    "CREATE VIRTUAL TABLE adapter_name_terms USING fts5vocab('adapter_name_grams', 'row')",
    (
        "CREATE TRIGGER adapter_names_added AFTER INSERT ON adapter_names BEGIN "
        "INSERT INTO adapter_name_grams (rowid, name) VALUES (new.number, new.name_folded || char(1, 1)); END"
    ),
    (
        "CREATE TRIGGER adapter_names_removed AFTER DELETE ON adapter_names BEGIN "
        "INSERT INTO adapter_name_grams (adapter_name_grams, rowid, name) "
        "VALUES ('delete', old.number, old.name_folded || char(1, 1)); END"
    ),
    (
        "INSERT INTO adapter_names (adapter_id, created_at, name_folded) "
        "SELECT id, created_at, name_folded FROM adapters WHERE deleted_at IS NULL ORDER BY created_at, id"
    ),
    (
        "CREATE TRIGGER adapters_name_added AFTER INSERT ON adapters WHEN new.deleted_at IS NULL BEGIN "
        "INSERT INTO adapter_names (adapter_id, created_at, name_folded) "
        "VALUES (new.id, new.created_at, new.name_folded); END"
    ),
    (
        "CREATE TRIGGER adapters_name_changed AFTER UPDATE OF name_folded, created_at, deleted_at ON adapters BEGIN "
        "DELETE FROM adapter_names WHERE adapter_id = old.id; "
        "INSERT INTO adapter_names (adapter_id, created_at, name_folded) "
        "SELECT new.id, new.created_at, new.name_folded WHERE new.deleted_at IS NULL; END"
    ),
    (
        "CREATE TRIGGER adapters_name_removed AFTER DELETE ON adapters BEGIN "
        "DELETE FROM adapter_names WHERE adapter_id = old.id; END"
    ),
)
POSTGRESQL = (
    (
        "CREATE FUNCTION rankwise_name_grams(name text) RETURNS tsvector LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE "
        "AS $$ SELECT array_to_tsvector(array_agg(DISTINCT substr(name || chr(1) || chr(1), place, 3))) "
        "FROM generate_series(1, length(name)) AS place $$"
    ),
    # without the list of pending entries, which every search would have to read through
    (
        "CREATE INDEX ix_adapters_name_grams ON adapters USING gin (rankwise_name_grams(name_folded)) "
        "WITH (fastupdate = off) WHERE deleted_at IS NULL"
    ),
)


def upgrade() -> None:
    with op.batch_alter_table("adapter_files", schema=None) as batch_op:
        batch_op.add_column(sa.Column("created_at", sa.DateTime(timezone=True), nullable=True))
        batch_op.drop_index("ix_adapter_files_sha256")
    op.execute(
        "UPDATE adapter_files SET created_at = "
        "(SELECT adapters.created_at FROM adapters WHERE adapters.id = adapter_files.adapter_id)"
    )
    with op.batch_alter_table("adapter_files", schema=None) as batch_op:
        batch_op.alter_column("created_at", existing_type=sa.DateTime(timezone=True), nullable=False)
        batch_op.create_index("ix_adapter_files_content", ["sha256", "created_at", "adapter_id"], unique=False)

    # the tags of live adapters only, which are all that is ever looked for
    op.execute("DELETE FROM adapter_tags WHERE adapter_id IN (SELECT id FROM adapters WHERE deleted_at IS NOT NULL)")

    for name in INDEXES:
        op.drop_index(f"ix_adapters_{name}", table_name="adapters")
        op.create_index(f"ix_adapters_{name}", "adapters", [*INDEXES[name], "deleted_at"], **LIVE)
    for statement in SQLITE if op.get_bind().dialect.name == "sqlite" else POSTGRESQL:
        op.execute(sa.text(statement))


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for trigger in ("adapters_name_added", "adapters_name_changed", "adapters_name_removed"):
            op.execute(f"DROP TRIGGER {trigger}")
        for table in ("adapter_name_terms", "adapter_name_grams", "adapter_names"):
            op.execute(f"DROP TABLE {table}")
    else:
        op.execute("DROP INDEX ix_adapters_name_grams")
        op.execute("DROP FUNCTION rankwise_name_grams(text)")
    for name in INDEXES:
        op.drop_index(f"ix_adapters_{name}", table_name="adapters")
    op.create_index("ix_adapters_weights_digest", "adapters", ["weights_digest"])
    op.create_index("ix_adapters_created", "adapters", ["created_at", "id"], **LIVE)
    for name in ("base_model", "model_id", "method"):
        op.create_index(f"ix_adapters_{name}", "adapters", [name, "created_at", "id"], **LIVE)
    with op.batch_alter_table("adapter_files", schema=None) as batch_op:
        batch_op.drop_index("ix_adapter_files_content")
        batch_op.drop_column("created_at")
        batch_op.create_index("ix_adapter_files_sha256", ["sha256"], unique=False)
