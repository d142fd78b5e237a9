"""How long jobs of a kind have run lately, and what that says of one that runs now."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage.tables import JobAttemptRow, JobRow

NEWEST = 50
FEWEST = 3  # fewer say nothing
_SMALLEST_FRACTION = 0.01


@dataclass(frozen=True, slots=True)
class RunTimes:
    """Run times of the newest succeeded jobs of a kind, in seconds: of the attempt that succeeded, without the wait."""

    runs: int
    median: float
    p90: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> RunTimes | None:
        """None if they are fewer than `FEWEST`."""
        if len(seconds) < FEWEST:
            return None
        ordered = sorted(seconds)
        return cls(len(ordered), statistics.median(ordered), ordered[math.ceil(0.9 * len(ordered)) - 1])


def run_times(session: Session, kind: str) -> RunTimes | None:
    """Of the newest `NEWEST` jobs of this kind that succeeded; None if there are too few."""
    newest = (
        select(JobRow.id, JobRow.attempt)
        .where(JobRow.kind == kind, JobRow.state == "succeeded")
        .order_by(JobRow.created_at.desc(), JobRow.id.desc())
        .limit(NEWEST)
        .subquery()
    )
    rows = session.execute(
        select(JobAttemptRow.started_at, JobAttemptRow.finished_at).join(
            newest, (JobAttemptRow.job_id == newest.c.id) & (JobAttemptRow.attempt == newest.c.attempt)
        )
    )
    return RunTimes.of(
        [max(0.0, (finished - started).total_seconds()) for started, finished in rows if finished is not None]
    )


def seconds_left(fraction: float, elapsed: float, history: RunTimes | None) -> float | None:
    """Seconds until an attempt ends, from what it tells of itself and from what others took.

    With f = `fraction` done after e = `elapsed` seconds, the attempt itself promises e·(1 − f)/f more. History says
    median − e, or p90 − e for one that is slower than the median, and nothing for one that is slower than that. Both
    are blended by f: the further an attempt is, the more its own progress counts.

    Returns:
        None when neither says anything.
    """
    own = elapsed * (1.0 - fraction) / fraction if fraction >= _SMALLEST_FRACTION else None
    others = None
    if history is not None:
        others = next((bound - elapsed for bound in (history.median, history.p90) if bound > elapsed), None)
    if own is None or others is None:
        return others if own is None else own
    return fraction * own + (1.0 - fraction) * others
