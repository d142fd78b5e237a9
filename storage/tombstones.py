"""Rows that a delete hides, until a sweep takes them away."""

from __future__ import annotations

from typing import TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage import database
from storage.quotas import release_bytes
from storage.tables import AdapterRow, DatasetRow, ImageRow
from storage.text import is_storable

Row = TypeVar("Row", AdapterRow, DatasetRow, ImageRow)


def lock_shown(session: Session, kind: type[Row], identifier: str) -> Row | None:
    """The row as it is now, locked until the transaction ends; None if there is none, or it is hidden."""
    if not is_storable(identifier):
        return None
    return session.scalars(
        select(kind)
        .where(kind.id == identifier, kind.deleted_at.is_(None))
        .with_for_update()
        .execution_options(populate_existing=True)
    ).one_or_none()


def hide(session: Session, row: Row) -> None:
    """Hide a row of `lock_shown`; its bytes count no more for the key that stored them."""
    row.deleted_at = database.now(session)
    release_bytes(session, row.created_by, row.size)
    session.flush()
