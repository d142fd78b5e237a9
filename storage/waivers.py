"""Waivers: somebody has accepted that an adapter goes out of use with its base model."""

from __future__ import annotations

from sqlalchemy.orm import Session

from artifacts.errors import NotFound
from storage import database
from storage.tables import AdapterRow, AdapterWaiverRow
from storage.text import is_storable, storable
from storage.tombstones import lock_shown


def get_waiver(session: Session, adapter_id: str) -> AdapterWaiverRow | None:
    """The adapter's waiver, if it has one."""
    return session.get(AdapterWaiverRow, adapter_id) if is_storable(adapter_id) else None


def put_waiver(session: Session, adapter_id: str, reason: str, *, created_by: str | None = None) -> AdapterWaiverRow:
    """Waive the adapter; a second time replaces the reason.

    Raises:
        NotFound: there is no such adapter.
    """
    _lock_adapter(session, adapter_id)
    given = {"reason": storable(reason, "/reason"), "created_by": created_by, "created_at": database.now(session)}
    row = session.merge(AdapterWaiverRow(adapter_id=adapter_id, **given))
    session.flush()
    return row


def drop_waiver(session: Session, adapter_id: str) -> None:
    """Take the waiver back.

    Raises:
        NotFound: there is no such adapter, or it has no waiver.
    """
    _lock_adapter(session, adapter_id)
    row = session.get(AdapterWaiverRow, adapter_id)
    if row is None:
        raise NotFound(f"adapter {adapter_id} has no waiver")
    session.delete(row)
    session.flush()


def _lock_adapter(session: Session, adapter_id: str) -> None:
    if lock_shown(session, AdapterRow, adapter_id) is None:
        raise NotFound(f"there is no adapter {adapter_id!r}")
