"""Jobs: list, show, cancel, retry, follow."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse

from app.dependencies import IdempotencyKey, JobId, JobRunner, Reader, ServicesDep, WaitSeconds
from app.events import EVENT_SCHEMA, job_events
from app.idempotency import Answer, answer_once, request_key
from app.job_answers import JOB_RESPONSES, accepted, answer_or_wait, job_body
from app.job_kinds import check_submission
from app.json_body import JsonRoute
from app.problems import problem_responses
from app.schemas.common import PageOf
from app.schemas.jobs import Job, JobQuery
from app.waiting import wait_for_job
from artifacts.menu import accepted_parameters
from storage import jobs
from storage.jobs import JobFilter
from storage.tables import TERMINAL_STATES

router = APIRouter(tags=["jobs"], route_class=JsonRoute)


@router.get("/jobs", summary="List jobs", response_model=PageOf[Job], responses=problem_responses())
def list_jobs(services: ServicesDep, principal: Reader, query: Annotated[JobQuery, Query()]) -> JSONResponse:
    """Newest first."""
    with services.database.read() as session:
        page = jobs.list_jobs(
            session, JobFilter(kind=query.kind, state=query.state), cursor=query.cursor, limit=query.limit
        )
        items = [Job.in_list(row).body() for row in page.items]
    return JSONResponse({"items": items, "next": page.next})


@router.get(
    "/jobs/{job_id}",
    summary="Show a job",
    response_model=Job,
    responses={
        200: {"headers": {"Preference-Applied": {"schema": {"type": "string"}}}},
        **problem_responses(404),
    },
)
async def get_job(
    request: Request, services: ServicesDep, principal: Reader, job_id: JobId, wait: WaitSeconds
) -> JSONResponse:
    """With `Prefer: wait=30` the answer comes when the job has ended, or after that many seconds."""
    headers: dict[str, str] = {}
    if wait > 0 and await wait_for_job(request, services, job_id, wait):
        headers["Preference-Applied"] = "wait"
    return JSONResponse(await run_in_threadpool(job_body, services, job_id), headers=headers)


@router.post(
    "/jobs/{job_id}/cancel",
    summary="Cancel a job",
    response_model=Job,
    responses=problem_responses(404, 409, 413, 507),
)
def cancel_job(
    services: ServicesDep, principal: JobRunner, job_id: JobId, idempotency_key: IdempotencyKey = None
) -> JSONResponse:
    """A queued job is cancelled at once; a running one is `cancelling` until its process has ended."""

    def act(session: Session) -> Answer:
        return Answer(200, Job.of(session, jobs.request_cancel(session, job_id)).body())

    key = request_key(principal.owner, idempotency_key, f"POST /jobs/{job_id}/cancel", None)
    answer = answer_once(services, key, act)
    services.wake_pool()
    return answer.response()


@router.post(
    "/jobs/{job_id}/retry",
    status_code=202,
    summary="Run a failed or cancelled job again",
    response_model=Job,
    responses={**JOB_RESPONSES, **problem_responses(404, 409, 413, 429, 507)},
)
async def retry_job(
    request: Request,
    services: ServicesDep,
    principal: JobRunner,
    job_id: JobId,
    wait: WaitSeconds,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """A new job with the same parameters. What can no longer be done is refused, as when it was first submitted."""
    request_id: str = request.state.request_id

    def act(session: Session) -> Answer:
        old = jobs.retryable(session, job_id)
        # Of confidential inputs the retry itself tells whether they are there still.
        with accepted_parameters():
            check_submission(services.settings, session, old.kind, old.params, old.resources, sealed=True)
        job = jobs.retry_job(
            session,
            job_id,
            created_by=principal.key_id,
            request_id=request_id,
            max_queued=services.settings.max_queued_jobs,
        )
        return accepted(session, job)

    key = request_key(principal.owner, idempotency_key, f"POST /jobs/{job_id}/retry", None)
    answer = await run_in_threadpool(answer_once, services, key, act)
    services.wake_pool()
    return await answer_or_wait(request, services, answer, wait)


@router.get(
    "/jobs/{job_id}/events",
    summary="Follow a job",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "Server-sent events: `id` is the sequence number, `event` state, progress, preview, warning",
            "content": {"text/event-stream": {"schema": EVENT_SCHEMA}},
        },
        204: {"description": "The job has ended and the client has seen all its events: do not come back"},
        **problem_responses(404),
    },
)
def follow_job(
    services: ServicesDep,
    principal: Reader,
    job_id: JobId,
    last_event_id: Annotated[
        int | None, Header(alias="Last-Event-ID", ge=0, le=2**31 - 1, description="Resume behind this event.")
    ] = None,
) -> Response:
    """Every event from the first, or from behind `Last-Event-ID`; the stream ends with the job."""
    after = last_event_id or 0
    with services.database.read() as session:
        row = jobs.get_job(session, job_id)
    if row.state in TERMINAL_STATES and after >= row.last_event:
        return Response(status_code=204)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(job_events(services, job_id, after), headers=headers, media_type="text/event-stream")
