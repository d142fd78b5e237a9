"""An attempt may end because its job has to wait for jobs of its own: it leaves its slot to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from storage.federations import suspend
from workers.context import JobContext

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


@dataclass(frozen=True, slots=True)
class JobPause:
    """What a job's function returns instead of an outcome.

    Attributes:
        before: makes what is waited for, in the transaction that pauses the job, which it has locked. What must last
            was put into the checkpoint before.
    """

    before: Callable[[Session], None]
    message: str
    fraction: float


def pause(context: JobContext, wanted: JobPause) -> None:
    """Queue the job until what it waits for is there.

    Raises:
        AttemptStale, AttemptCancelled: nothing was written.
    """
    spec = context.spec
    with context.database.write() as session:
        suspend(
            session,
            spec.job_id,
            spec.attempt,
            before=wanted.before,
            message=wanted.message,
            fraction=wanted.fraction,
        )
