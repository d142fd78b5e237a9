"""Runs the migrations on the connection that storage.migrations hands over, or on the database of the command line."""

from __future__ import annotations

import os
from logging.config import fileConfig
from typing import Any, Literal

from alembic.autogenerate.api import AutogenContext
from sqlalchemy import Connection
from sqlalchemy.sql.schema import SchemaItem

from alembic import context
from storage.columns import Json, UtcDateTime
from storage.database import Database
from storage.tables import Base


def include_object(item: SchemaItem, name: str | None, kind: str, reflected: bool, other: SchemaItem | None) -> bool:
    """Leave tables alone that are not Rankwise's, so that a database may be shared, and the index of names (0003)."""
    unknown = kind == "table" and name not in Base.metadata.tables
    return not (reflected and other is None and (unknown or name == "ix_adapters_name_grams"))


def render_item(kind: str, item: object, _: AutogenContext) -> str | Literal[False]:
    """Write our own column types in words that a migration keeps when the code has changed."""
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    if kind == "type" and item is Json:
        return "JSON"  # defined in script.py.mako
    return False


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        transactional_ddl=True,
        compare_type=True,
        include_object=include_object,
        render_item=render_item,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_from_command_line() -> None:
    if context.config.config_file_name is not None:
        fileConfig(context.config.config_file_name, disable_existing_loggers=False)
    arguments: Any = context.get_x_argument(as_dictionary=True)
    url = arguments.get("url") or os.environ.get("RANKWISE_DATABASE_URL")
    if not url:
        raise SystemExit("Name the database: RANKWISE_DATABASE_URL=… alembic …, or alembic -x url=… …")
    with Database(url).migration_engine().begin() as connection:
        run(connection)


if context.is_offline_mode():
    raise SystemExit("Migrations need the database itself; writing SQL to a file is not supported.")
handed_over = context.config.attributes.get("connection")
if handed_over is None:
    run_from_command_line()
else:
    run(handed_over)
