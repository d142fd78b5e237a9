"""POST /adapters/{id}/load-check: an adapter really loaded by an engine's own library, as a job."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from app.dependencies import AdapterId, IdempotencyKey, JobRunner, ServicesDep, WaitSeconds
from app.job_answers import JOB_RESPONSES, answer_or_wait
from app.json_body import JsonRoute
from app.problems import problem_responses
from app.schemas.common import as_json
from app.schemas.jobs import Job
from app.schemas.load_checks import LoadCheckRequest
from app.submission import submitted
from storage import adapters

router = APIRouter(tags=["adapters"], route_class=JsonRoute)


@router.post(
    "/adapters/{adapter_id}/load-check",
    status_code=202,
    summary="Really load an adapter in an engine's library",
    response_model=Job,
    responses={**JOB_RESPONSES, **problem_responses(404, 409, 413, 415, 429, 507)},
)
async def check_loading(
    request: Request,
    services: ServicesDep,
    principal: JobRunner,
    adapter_id: AdapterId,
    body: LoadCheckRequest,
    wait: WaitSeconds,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """PEFT, transformers or diffusers load the file that a download gives, into the base model's own class without its
    weights. The report has a verdict (`loads`, `changes`, `partly`, `nothing`, `refuses`), how many modules got their
    numbers, what the library left out or made up, and what it said."""
    answer = await submitted(
        request,
        services,
        principal,
        "load_check",
        {"adapter": adapter_id, **as_json(body, exclude={"resources"})},
        body.resources,
        idempotency_key,
        subject=lambda session: adapters.get_adapter(session, adapter_id),
    )
    return await answer_or_wait(request, services, answer, wait)
