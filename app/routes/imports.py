"""POST /adapters/import: adapters of other servers, checked when it is submitted, fetched by the pool."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from app.dependencies import IdempotencyKey, JobRunner, ServicesDep, WaitSeconds
from app.job_answers import JOB_RESPONSES, answer_or_wait
from app.json_body import JsonRoute
from app.problems import problem_responses
from app.schemas.common import as_json
from app.schemas.imports import ImportRequest
from app.schemas.jobs import Job
from app.submission import submit

router = APIRouter(tags=["adapters"], route_class=JsonRoute)


@router.post(
    "/adapters/import",
    status_code=202,
    summary="Fetch an adapter from elsewhere",
    response_model=Job,
    responses={**JOB_RESPONSES, **problem_responses(409, 413, 415, 429, 507)},
)
async def import_adapter(
    request: Request,
    services: ServicesDep,
    principal: JobRunner,
    body: ImportRequest,
    wait: WaitSeconds,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """From a hub, a URL or a bucket that the settings allow; taken in like an upload, with the commit and the digest of
    every file kept. The same content again gives the adapter that is there."""
    answer = await run_in_threadpool(
        submit,
        services,
        principal,
        "import",
        as_json(body, exclude={"resources"}),
        body.resources,
        idempotency_key=idempotency_key,
        request_id=request.state.request_id,
    )
    return await answer_or_wait(request, services, answer, wait)
