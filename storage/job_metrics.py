"""What jobs measure on the way, as a series over their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from storage import database
from storage.jobs import get_job
from storage.tables import JobMetricRow
from storage.transitions import lock_running
from storage.upsert import dialect_insert

LARGEST_STEP = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Point:
    """The numbers of one step."""

    step: int
    numbers: Mapping[str, float]


def record_metrics(session: Session, job_id: str, attempt: int, points: Sequence[Point]) -> None:
    """Write the numbers of some steps; a step that is there already is replaced.

    Raises:
        AttemptStale: a newer attempt owns the job; nothing was written.
        AttemptCancelled: the job is being cancelled.
    """
    lock_running(session, job_id, attempt)
    if not points:
        return
    moment = database.now(session)
    values = [
        {
            "job_id": job_id,
            "step": point.step,
            "attempt": attempt,
            "numbers": dict(point.numbers),
            "created_at": moment,
        }
        for point in points
    ]
    statement = dialect_insert(session, JobMetricRow).values(values)
    session.execute(
        statement.on_conflict_do_update(
            index_elements=["job_id", "step"],
            set_={name: statement.excluded[name] for name in ("attempt", "numbers", "created_at")},
        )
    )


def metrics_after(session: Session, job_id: str, step: int, limit: int) -> list[tuple[Point, datetime]]:
    """The points behind `step`, in order, at most `limit`.

    Raises:
        NotFound: there is no such job.
    """
    get_job(session, job_id)
    rows = session.scalars(
        select(JobMetricRow)
        .where(JobMetricRow.job_id == job_id, JobMetricRow.step > step)
        .order_by(JobMetricRow.step)
        .limit(limit)
    )
    return [(Point(row.step, row.numbers), row.created_at) for row in rows]


def thinned(session: Session, job_id: str, points: int) -> list[Point]:
    """About `points` of the series at equal distances, and the last one: enough for a picture.

    Raises:
        NotFound: there is no such job.
    """
    get_job(session, job_id)
    mine = JobMetricRow.job_id == job_id
    last = session.scalar(select(func.max(JobMetricRow.step)).where(mine))
    if last is None:
        return []
    stride = max(1, last // points)
    rows = session.scalars(
        select(JobMetricRow)
        .where(mine, (JobMetricRow.step % stride == 0) | (JobMetricRow.step == last))
        .order_by(JobMetricRow.step)
    )
    return [Point(row.step, row.numbers) for row in rows]
