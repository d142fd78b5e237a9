"""What API keys use of their limits: stored bytes, kept with every change, and the jobs that wait and run."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import func, or_, select, update
from sqlalchemy.orm import Session

from artifacts.errors import QuotaExceeded
from storage.tables import ApiKeyRow, JobQueueRow

RETRY_SECONDS = 60


@dataclass(frozen=True, slots=True)
class KeyUse:
    """Jobs of a key that wait and that run, and the device slots that the running ones hold."""

    queued: int = 0
    running: int = 0
    slots: int = 0


def charge_bytes(session: Session, key_id: str | None, size: int) -> None:
    """Count `size` bytes as stored by this key. Nothing is counted without a key.

    One statement checks and counts, and keeps the key's row locked until the transaction ends: two uploads at once
    can not both take the last room.

    Raises:
        QuotaExceeded: the key may not store that much; nothing is counted.
    """
    if key_id is None:
        return
    counted = session.scalar(
        update(ApiKeyRow)
        .where(
            ApiKeyRow.id == key_id,
            or_(ApiKeyRow.max_bytes.is_(None), ApiKeyRow.stored_bytes + size <= ApiKeyRow.max_bytes),
        )
        .values(stored_bytes=ApiKeyRow.stored_bytes + size)
        .returning(ApiKeyRow.id)
        .execution_options(synchronize_session=False)
    )
    if counted is not None:
        return
    key = session.get(ApiKeyRow, key_id, populate_existing=True)
    if key is None or key.max_bytes is None:
        raise AssertionError(f"the bytes of {key_id} could not be counted although it has no limit")
    free = max(0, key.max_bytes - key.stored_bytes)
    raise QuotaExceeded(
        f"{size} bytes do not fit: the API key {key.name!r} may store {key.max_bytes} bytes, and {free} are free",
        hint="Delete adapters or datasets that are no longer needed, or ask for a larger limit.",
        retry_after=RETRY_SECONDS,
    )


def release_bytes(session: Session, key_id: str | None, size: int) -> None:
    """Count `size` bytes of this key as given back."""
    if key_id is None:
        return
    session.execute(
        update(ApiKeyRow)
        .where(ApiKeyRow.id == key_id)
        .values(stored_bytes=ApiKeyRow.stored_bytes - size)
        .execution_options(synchronize_session=False)
    )


def key_uses(session: Session) -> dict[str, KeyUse]:
    """Owner → its jobs, of all owners that have any; the owner of what came without a key is `tables.ANONYMOUS`."""
    rows = session.execute(
        select(
            JobQueueRow.owner,
            func.sum(JobQueueRow.queued),
            func.sum(JobQueueRow.running),
            func.sum(JobQueueRow.running * JobQueueRow.devices),
        ).group_by(JobQueueRow.owner)
    )
    return {owner: KeyUse(int(queued), int(running), int(slots)) for owner, queued, running, slots in rows}
