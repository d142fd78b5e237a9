"""Idempotency keys: the first answer to a POST, given again to every repetition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from artifacts.errors import Conflict, FieldError, IdempotencyInFlight, IdempotencyKeyReused
from storage import database
from storage.tables import IdempotencyRow
from storage.text import storable
from storage.upsert import insert_or_ignore

STALE_AFTER = timedelta(minutes=10)
KEEP_FOR = timedelta(days=7)
_TRIES = 5


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """The first answer: HTTP status, headers and body."""

    status: int
    headers: dict[str, str]
    body: str


def begin(session: Session, owner: str, key: str, request_digest: str) -> StoredAnswer | None:
    """Take the key for this request: None means that it is the first and has to be served.

    Commit this before serving the request if repetitions must be turned away while it runs; then `complete` in the
    transaction that does what was asked for.

    Args:
        owner: API key id, or "anonymous".
        request_digest: SHA-256 (hex) of everything that makes the request what it is.

    Raises:
        IdempotencyKeyReused: the key was used for another request.
        IdempotencyInFlight: the first request still runs; one that began over 10 minutes ago is given up.
        RequestInvalid: a key that can not be stored.
    """
    storable(key, "/Idempotency-Key", 255)
    moment = database.now(session)
    values = {"owner": owner, "key": key, "request_digest": request_digest, "created_at": moment}
    for _ in range(_TRIES):
        added = insert_or_ignore(session, IdempotencyRow, values).returning(IdempotencyRow.id)
        if session.scalar(added) is not None:
            return None
        row = session.scalars(
            select(IdempotencyRow)
            .where(IdempotencyRow.owner == owner, IdempotencyRow.key == key)
            .with_for_update()
            .execution_options(populate_existing=True)
        ).one_or_none()
        if row is None:
            continue  # abandoned between the two statements
        if row.request_digest != request_digest:
            raise IdempotencyKeyReused(
                f"the idempotency key {key!r} was used for another request",
                hint="Use a new key for every new request.",
                errors=[FieldError("/Idempotency-Key", "was used with another body")],
            )
        if row.status is not None:
            return StoredAnswer(row.status, row.headers or {}, row.body or "")
        if row.created_at > moment - STALE_AFTER:
            break
        row.created_at = moment
        session.flush()
        return None
    raise IdempotencyInFlight(
        f"the first request with the idempotency key {key!r} still runs", hint="Repeat the request in a moment."
    )


def complete(session: Session, owner: str, key: str, status: int, headers: Mapping[str, str], body: str) -> None:
    """Keep the answer; call it in the transaction that does what was asked for.

    Raises:
        Conflict: another request took the key over and has answered: roll back, so that it is not done twice.
    """
    done = session.scalar(
        update(IdempotencyRow)
        .where(IdempotencyRow.owner == owner, IdempotencyRow.key == key, IdempotencyRow.status.is_(None))
        .values(status=status, headers=dict(headers), body=body)
        .returning(IdempotencyRow.id)
        .execution_options(synchronize_session=False)
    )
    if done is None:
        raise Conflict(
            f"another request with the idempotency key {key!r} was answered meanwhile",
            hint="Repeat the request to get that answer.",
        )


def abandon(session: Session, owner: str, key: str) -> None:
    """The request failed without doing anything: the key is free for another try. An answer is not forgotten."""
    session.execute(
        delete(IdempotencyRow)
        .where(IdempotencyRow.owner == owner, IdempotencyRow.key == key, IdempotencyRow.status.is_(None))
        .execution_options(synchronize_session=False)
    )


def forget(session: Session, older_than: timedelta = KEEP_FOR) -> int:
    """Drop the keys taken longer ago than that; returns how many."""
    dropped = session.scalars(
        delete(IdempotencyRow)
        .where(IdempotencyRow.created_at < database.now(session) - older_than)
        .returning(IdempotencyRow.id)
        .execution_options(synchronize_session=False)
    ).all()
    return len(dropped)
