"""How a checked submission becomes a job, whatever road it came by."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.job_kinds import Submission
from app.settings import Settings
from storage import jobs, sealed_inputs, transfers
from storage.tables import JobRow


def make_job(
    settings: Settings,
    session: Session,
    wanted: Submission,
    *,
    created_by: str | None,
    request_id: str | None = None,
    schedule_id: str | None = None,
) -> tuple[JobRow, bool]:
    """The job, its first event and what goes with it; False with a job that does the same already.

    Only transfers are looked for: of two equal ones the first is the answer to both, unless it failed or was cancelled.
    Then the new one goes on from its stage outputs.

    Raises:
        QueueFull, QuotaExceeded
    """
    plan = wanted.transfer
    same = None if plan is None else transfers.find_same(session, plan.facts.request_key)
    if same is not None and not transfers.may_be_repeated(same[1]):
        return same[1], False
    job = jobs.create_job(
        session,
        wanted.kind,
        wanted.params,
        resources=wanted.resources,
        affinity=wanted.affinity,
        created_by=created_by,
        request_id=request_id,
        schedule_id=schedule_id,
        max_queued=settings.max_queued_jobs,
    )
    if plan is not None:
        transfers.add_transfer(session, job, plan.facts, None if same is None else same[0])
    if wanted.sealed is not None:
        sealed_inputs.seal(session, job.id, wanted.sealed)
    return job, True
