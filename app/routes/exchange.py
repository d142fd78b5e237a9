"""Adapters fetched from other servers and sent to them: checked when it is submitted, done by the pool."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from app.dependencies import AdapterId, IdempotencyKey, JobRunner, ServicesDep, WaitSeconds
from app.job_answers import JOB_RESPONSES, answer_or_wait
from app.json_body import JsonRoute
from app.problems import method_not_allowed, problem_responses
from app.schemas.common import as_json
from app.schemas.imports import ImportRequest
from app.schemas.jobs import Job
from app.schemas.pushes import PushRequest
from app.submission import submitted
from storage import adapters

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
    answer = await submitted(
        request, services, principal, "import", as_json(body, exclude={"resources"}), body.resources, idempotency_key
    )
    return await answer_or_wait(request, services, answer, wait)


@router.api_route(
    "/adapters/import",
    methods=["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"],
    include_in_schema=False,
)
def refuse_other_methods(request: Request) -> Response:
    """No adapter has the id "import"."""
    return method_not_allowed(request, "POST")


@router.post(
    "/adapters/{adapter_id}/push",
    status_code=202,
    summary="Send an adapter elsewhere",
    response_model=Job,
    responses={**JOB_RESPONSES, **problem_responses(404, 409, 413, 415, 429, 507)},
)
async def push_adapter(
    request: Request,
    services: ServicesDep,
    principal: JobRunner,
    adapter_id: AdapterId,
    body: PushRequest,
    wait: WaitSeconds,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """To a repository of the hub, or as an OCI image layout to a bucket, as far as the settings allow; in any format,
    dtype and rank that a download has. The report has the commit or the manifest's digest, and that of every file."""
    answer = await submitted(
        request,
        services,
        principal,
        "push",
        {"adapter": adapter_id, **as_json(body, exclude={"resources"})},
        body.resources,
        idempotency_key,
        subject=lambda session: adapters.get_adapter(session, adapter_id),
    )
    return await answer_or_wait(request, services, answer, wait)
