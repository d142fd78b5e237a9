"""POST /merge: checked when it is submitted, done by the pool."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from app.auth import Principal
from app.dependencies import IdempotencyKey, JobRunner, ServicesDep, WaitSeconds
from app.idempotency import Answer, answer_once, request_key
from app.job_answers import JOB_RESPONSES, accepted, answer_or_wait
from app.job_kinds import check_submission, pointers_below
from app.json_body import JsonRoute
from app.problems import problem_responses
from app.schemas.common import as_json
from app.schemas.jobs import Job
from app.schemas.merge import MergeRequest
from app.state import Services
from storage import jobs

router = APIRouter(tags=["merge"], route_class=JsonRoute)


@router.post(
    "/merge",
    status_code=202,
    summary="Merge adapters",
    response_model=Job,
    responses={**JOB_RESPONSES, **problem_responses(409, 413, 415, 429, 507)},
)
async def merge_adapters(
    request: Request,
    services: ServicesDep,
    principal: JobRunner,
    body: MergeRequest,
    wait: WaitSeconds,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """Many adapters of one base model in, one adapter out.

    A merge that can not be done (unknown adapters, other base models or shapes, weights or ranks that make no sense)
    is refused here, not later in the queue. With `Prefer: wait=30` the answer is the finished job, if it ends in time.
    """
    request_id: str = request.state.request_id
    answer = await run_in_threadpool(submit_merge, services, principal, body, idempotency_key, request_id)
    return await answer_or_wait(request, services, answer, wait)


def submit_merge(
    services: Services, principal: Principal, body: MergeRequest, idempotency_key: str | None, request_id: str
) -> Answer:
    """Check the merge and create its job, together with its first event and its idempotency key.

    Raises:
        RequestInvalid and its kin: see app.job_kinds.check_submission.
        QueueFull, QuotaExceeded
    """
    params: dict[str, Any] = as_json(body, exclude={"resources"})
    resources: dict[str, Any] = {} if body.resources is None else as_json(body.resources, exclude_none=True)

    def act(session: Session) -> Answer:
        with pointers_below("", instead_of="/params"):
            wanted = check_submission(services.settings, session, "merge", params, resources)
        job = jobs.create_job(
            session,
            wanted.kind,
            wanted.params,
            resources=wanted.resources,
            affinity=wanted.affinity,
            created_by=principal.key_id,
            request_id=request_id,
            max_queued=services.settings.max_queued_jobs,
        )
        return accepted(session, job)

    payload = {**params, "resources": resources}
    answer = answer_once(services, request_key(principal.owner, idempotency_key, "POST /merge", payload), act)
    if not answer.replayed:
        services.job_made("merge")
    return answer
