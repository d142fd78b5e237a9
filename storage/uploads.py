"""Uploads that come in pieces: every piece is a blob, so that any server can take the next one.

How much is there is decided in the database: a piece counts once its blob is stored and the row that names it is
committed, and of two that begin at one byte only the first counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from artifacts.errors import NotFound, QuotaExceeded, StateConflict, UploadOffsetMismatch
from storage import database, quotas
from storage.blob_rows import end_reservation
from storage.ids import new_id
from storage.pagination import DEFAULT_LIMIT, Page, page_of
from storage.tables import UploadRow, UploadSegmentRow
from storage.text import storable

MAX_OPEN = 100
"""Uploads that one key may have open."""
MAX_SEGMENTS = 10_000
"""Pieces of one upload: appends of a few bytes would make a blob each."""
_BATCH = 50


def create_upload(
    session: Session,
    *,
    created_by: str | None,
    file_name: str,
    form: Mapping[str, Any],
    length: int,
    sha256: str,
    lifetime: timedelta,
) -> UploadRow:
    """Announce a file of `length` bytes, which count as stored from now on.

    Args:
        lifetime: after the last byte came, before it is given up.

    Raises:
        QuotaExceeded: the key has too many open uploads, or no room for so many bytes.
    """
    moment = database.now(session)
    is_open = (UploadRow.state == "open", UploadRow.expires_at > moment, _of(created_by))
    opened = select(func.count()).select_from(UploadRow).where(*is_open)
    if (session.scalar(opened) or 0) >= MAX_OPEN:
        raise QuotaExceeded(
            f"{MAX_OPEN} uploads are open already",
            hint="Finish or delete some (GET /uploads lists them).",
            retry_after=quotas.RETRY_SECONDS,
        )
    quotas.charge_bytes(session, created_by, length)
    row = UploadRow(
        id=new_id("upl"),
        created_by=created_by,
        file_name=storable(file_name, "/file_name", 300),
        form=dict(form),
        length=length,
        sha256=sha256,
        received=0,
        segments=0,
        state="open",
        adapter_id=None,
        error=None,
        created_at=moment,
        expires_at=moment + lifetime,
    )
    session.add(row)
    session.flush()
    return row


def get_upload(
    session: Session, upload_id: str, *, owner: str | None, everyones: bool, lock: bool = False
) -> UploadRow:
    """An upload of this key.

    Args:
        everyones: whether the caller may see those of other keys.

    Raises:
        NotFound: there is none, it is another key's, or it has expired.
    """
    row = session.get(UploadRow, upload_id, with_for_update=lock, populate_existing=lock)
    hidden = row is None or (row.created_by != owner and not everyones)
    if row is None or hidden or row.expires_at <= database.now(session):
        raise NotFound(
            f"there is no upload {upload_id}",
            hint="An upload that gets no bytes for a while is given up; POST /uploads begins a new one.",
        )
    return row


def list_uploads(
    session: Session,
    *,
    owner: str | None,
    sha256: str | None = None,
    state: str | None = None,
    cursor: str | None = None,
    limit: int = DEFAULT_LIMIT,
) -> Page[UploadRow]:
    """Those of this key, newest first. Raises RequestInvalid: a bad cursor or limit."""
    statement = select(UploadRow).where(_of(owner), UploadRow.expires_at > database.now(session))
    if sha256 is not None:
        statement = statement.where(UploadRow.sha256 == sha256)
    if state is not None:
        statement = statement.where(UploadRow.state == state)
    filters = {"sha256": sha256, "state": state}
    return page_of(
        session, statement, (UploadRow.created_at, UploadRow.id), filters=filters, cursor=cursor, limit=limit
    )


def check_open(row: UploadRow) -> None:
    """Raises StateConflict unless it takes bytes."""
    if row.state == "open":
        return
    what = f"has become {row.adapter_id}" if row.state == "done" else f"has failed: {(row.error or {}).get('detail')}"
    raise StateConflict(f"the upload {row.id} {what}", hint="POST /uploads begins a new one.")


def check_offset(row: UploadRow, offset: int) -> None:
    """Raises UploadOffsetMismatch unless the next byte is number `offset`."""
    if row.received != offset:
        raise UploadOffsetMismatch(row.received, offset)


def add_segment(session: Session, upload_id: str, start: int, size: int, sha256: str, lifetime: timedelta) -> None:
    """Count the bytes of a blob, which was reserved and stored, as those from `start` on.

    Raises:
        UploadOffsetMismatch: others have come to that place.
        StateConflict: it takes no more bytes, or has too many pieces, or the blob was swept meanwhile.
        NotFound: it was deleted.
    """
    row = session.get(UploadRow, upload_id, with_for_update=True, populate_existing=True)
    if row is None:
        raise NotFound(f"there is no upload {upload_id} any more")
    check_open(row)
    check_offset(row, start)
    if row.segments >= MAX_SEGMENTS:
        raise StateConflict(
            f"the upload {upload_id} has come in {MAX_SEGMENTS} pieces, which is the most",
            hint="Begin a new one, and append more bytes at a time.",
        )
    if not end_reservation(session, sha256):
        raise StateConflict(
            f"the bytes from {start} on were removed before they counted", hint="Append the same bytes again."
        )
    session.add(UploadSegmentRow(upload_id=upload_id, start=start, size=size, sha256=sha256))
    row.received += size
    row.segments += 1
    row.expires_at = database.now(session) + lifetime
    session.flush()


def touch(session: Session, row: UploadRow, lifetime: timedelta) -> None:
    """It is being worked on: do not give it up."""
    row.expires_at = database.now(session) + lifetime


def segments_of(session: Session, upload_id: str) -> list[UploadSegmentRow]:
    """In the order of their bytes."""
    statement = select(UploadSegmentRow).where(UploadSegmentRow.upload_id == upload_id)
    return list(session.scalars(statement.order_by(UploadSegmentRow.start)))


def release(session: Session, row: UploadRow) -> None:
    """Give back the bytes that an open upload counts as stored; once, before it is finished or removed."""
    if row.state == "open":
        quotas.release_bytes(session, row.created_by, row.length)


def finish(session: Session, row: UploadRow, adapter_id: str) -> Sequence[str]:
    """It has become an adapter, and was released. Returns the digests of its segments."""
    row.state, row.adapter_id = "done", adapter_id
    return _drop_segments(session, [row.id])


def fail(session: Session, row: UploadRow, code: str, detail: str) -> Sequence[str]:
    """What came is no adapter: it can not be gone on with. Returns the digests of its segments."""
    release(session, row)
    row.state, row.error = "failed", {"code": code, "detail": detail}
    return _drop_segments(session, [row.id])


def remove(session: Session, row: UploadRow) -> Sequence[str]:
    """Forget it. Returns the digests of its segments."""
    release(session, row)
    digests = _drop_segments(session, [row.id])
    session.execute(delete(UploadRow).where(UploadRow.id == row.id))
    return digests


def expire(session: Session) -> tuple[int, Sequence[str]]:
    """Forget some of those whose time is over; returns how many, and the digests of their segments."""
    statement = select(UploadRow).where(UploadRow.expires_at <= database.now(session)).limit(_BATCH)
    rows = session.scalars(statement.with_for_update(skip_locked=True)).all()
    for row in sorted(rows, key=lambda row: row.created_by or ""):  # in one order for all: it locks their keys
        release(session, row)
    ids = [row.id for row in rows]
    digests = _drop_segments(session, ids)
    session.execute(delete(UploadRow).where(UploadRow.id.in_(ids)))
    return len(rows), digests


def _drop_segments(session: Session, ids: Sequence[str]) -> Sequence[str]:
    chosen = UploadSegmentRow.upload_id.in_(ids)
    digests = session.scalars(select(UploadSegmentRow.sha256).where(chosen).distinct()).all()
    session.execute(delete(UploadSegmentRow).where(chosen))
    return digests


def _of(owner: str | None) -> Any:
    return UploadRow.created_by.is_(None) if owner is None else UploadRow.created_by == owner
