"""INSERT … ON CONFLICT, which both databases have but SQLAlchemy spells per dialect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from storage.tables import Base


def dialect_insert(session: Session, table: type[Base]) -> sqlite.Insert | postgresql.Insert:
    """An INSERT of the session's database, which knows ON CONFLICT."""
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    return insert(table)


def insert_or_ignore(
    session: Session, table: type[Base], values: Mapping[str, Any] | Sequence[Mapping[str, Any]]
) -> sqlite.Insert | postgresql.Insert:
    """An INSERT that does nothing for a row that breaks a unique constraint.

    PostgreSQL first waits for the transaction that holds the conflicting row: afterwards that row is there to be
    read, unless it was rolled back, and then the insert goes through.
    """
    return dialect_insert(session, table).values(values).on_conflict_do_nothing()
