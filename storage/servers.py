"""Supervisors and their slots: who is alive, by the database's clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from artifacts.errors import NotFound
from storage import database
from storage.tables import ServerRow


def register_server(
    session: Session,
    server_id: str,
    boot_id: str,
    host: str,
    slots: Sequence[Mapping[str, Any]],
    *,
    pool: str = "local",
) -> ServerRow:
    """Write that a supervisor has started, as this boot, with these slots; replaces what its earlier boot wrote."""
    moment = database.now(session)
    row = session.get(ServerRow, server_id)
    if row is None:
        row = ServerRow(id=server_id)
        session.add(row)
    row.boot_id, row.host, row.pool, row.slots = boot_id, host, pool, [dict(slot) for slot in slots]
    row.started_at = row.seen_at = moment
    session.flush()
    return row


def beat_server(session: Session, server_id: str, slots: Sequence[Mapping[str, Any]]) -> None:
    """A sign of life, and what each slot does now.

    Raises:
        NotFound: the server never registered.
    """
    seen = session.scalar(
        update(ServerRow)
        .where(ServerRow.id == server_id)
        .values(seen_at=database.now(session), slots=[dict(slot) for slot in slots])
        .returning(ServerRow.id)
        .execution_options(synchronize_session=False)
    )
    if seen is None:
        raise NotFound(f"server {server_id!r} has not registered")


def list_servers(session: Session, alive_within: float | timedelta) -> list[ServerRow]:
    """The servers seen within the last `alive_within` (seconds, or a timedelta), by id."""
    window = alive_within if isinstance(alive_within, timedelta) else timedelta(seconds=alive_within)
    oldest = database.now(session) - window
    return list(session.scalars(select(ServerRow).where(ServerRow.seen_at >= oldest).order_by(ServerRow.id)))
