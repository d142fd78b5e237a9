"""The logs of attempts: pieces in the database while an attempt runs, a blob once it has ended.

The number of a piece is its offset in the log, in bytes; pieces that are missing between two others were left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from artifacts.errors import NotFound
from storage import database
from storage.conditions import IS_ACTIVE
from storage.jobs import get_job
from storage.log_text import HEAD_BYTES, TAIL_BYTES
from storage.tables import JobAttemptRow, JobLogRow, JobRow
from storage.upsert import dialect_insert

LARGEST_OFFSET = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the log of an attempt that runs."""

    offset: int
    text: str

    @property
    def end(self) -> int:
        """The offset behind it."""
        return self.offset + len(self.text.encode())


def append_pieces(session: Session, job_id: str, attempt: int, pieces: Sequence[Piece]) -> bool:
    """Write pieces of an attempt that runs; writing one again replaces it.

    Of a log that has grown longer than what is kept at the end, the pieces of the middle are dropped.

    Returns:
        False if the attempt is not the current one any more; nothing was written.
    """
    current = select(JobRow.id).where(JobRow.id == job_id, JobRow.attempt == attempt, IS_ACTIVE)
    current = current.with_for_update(read=True)  # until these pieces are there, nobody ends the attempt
    if session.scalar(current) is None:
        return False
    moment = database.now(session)
    values = [
        {"job_id": job_id, "attempt": attempt, "sequence": piece.offset, "text": piece.text, "created_at": moment}
        for piece in pieces
    ]
    statement = dialect_insert(session, JobLogRow).values(values)
    session.execute(
        statement.on_conflict_do_update(
            index_elements=["job_id", "attempt", "sequence"], set_={"text": statement.excluded.text}
        )
    )
    tail_from = pieces[-1].end - TAIL_BYTES
    if tail_from > HEAD_BYTES:
        session.execute(
            delete(JobLogRow).where(
                JobLogRow.job_id == job_id,
                JobLogRow.attempt == attempt,
                JobLogRow.sequence >= HEAD_BYTES,
                JobLogRow.sequence < tail_from,
            )
        )
    return True


def pieces_from(session: Session, job_id: str, attempt: int, offset: int, limit: int = 16) -> list[Piece]:
    """The pieces that begin at `offset` or behind it, in order, at most `limit`."""
    if offset > LARGEST_OFFSET:
        return []
    rows = session.execute(
        select(JobLogRow.sequence, JobLogRow.text)
        .where(JobLogRow.job_id == job_id, JobLogRow.attempt == attempt, JobLogRow.sequence >= offset)
        .order_by(JobLogRow.sequence)
        .limit(limit)
    )
    return [Piece(sequence, found) for sequence, found in rows]


def drop_pieces(session: Session, job_id: str, attempt: int) -> None:
    """The log is in the blob store now."""
    session.execute(delete(JobLogRow).where(JobLogRow.job_id == job_id, JobLogRow.attempt == attempt))


@dataclass(frozen=True, slots=True)
class LogState:
    """What is known of the log of an attempt.

    Attributes:
        sha256: the blob that holds it, once it is there.
        ended_since: seconds since the attempt has ended, by the database's clock; None while it runs.
    """

    attempt: int
    sha256: str | None
    ended_since: float | None


def log_state(session: Session, job_id: str, attempt: int | None = None) -> LogState:
    """Of this attempt, or of the newest one.

    Raises:
        NotFound: there is no such job, it has not run yet, or it has no such attempt.
    """
    job = get_job(session, job_id)
    wanted = job.attempt if attempt is None else attempt
    row = session.execute(
        select(JobAttemptRow.log_sha256, JobAttemptRow.finished_at).where(
            JobAttemptRow.job_id == job_id, JobAttemptRow.attempt == wanted
        )
    ).one_or_none()
    if row is None:
        if job.attempt == 0:
            raise NotFound(f"{job_id} has not run, so it has no log", hint=f"It is {job.state}.")
        raise NotFound(f"{job_id} has no attempt {wanted}", hint=f"Its newest one is {job.attempt}.")
    return LogState(wanted, row.log_sha256, _seconds_since(session, row.finished_at))


def live_bytes(session: Session) -> int:
    """Characters of all pieces: of the logs of attempts that run, and of those whose host was lost."""
    return session.scalar(select(func.coalesce(func.sum(func.length(JobLogRow.text)), 0))) or 0


def _seconds_since(session: Session, moment: datetime | None) -> float | None:
    return None if moment is None else (database.now(session) - moment).total_seconds()
