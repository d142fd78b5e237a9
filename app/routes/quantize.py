"""POST /models/{id}/quantize: a base model in a few bits, as a job."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from app.dependencies import IdempotencyKey, JobRunner, ModelId, ServicesDep, WaitSeconds
from app.job_answers import JOB_RESPONSES, answer_or_wait
from app.json_body import JsonRoute
from app.problems import problem_responses
from app.schemas.common import as_json
from app.schemas.jobs import Job
from app.schemas.quantize import QuantizeRequest
from app.submission import submitted
from storage import models

router = APIRouter(tags=["models"], route_class=JsonRoute)


@router.post(
    "/models/{model_id}/quantize",
    status_code=202,
    summary="Quantise a base model",
    response_model=Job,
    responses={**JOB_RESPONSES, **problem_responses(404, 409, 413, 415, 429, 507)},
)
async def quantize_model(
    request: Request,
    services: ServicesDep,
    principal: JobRunner,
    model_id: ModelId,
    body: QuantizeRequest,
    wait: WaitSeconds,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """Every linear layer becomes Q + L1·L2 with Q in 2 to 8 bits: a base model of its own, whose files stay packed.

    With `budget_bits` every format is tried on every matrix and the best mix within the budget is taken. The report
    has the sizes and the error of each matrix.
    """
    answer = await submitted(
        request,
        services,
        principal,
        "quantize",
        {"model": model_id, **as_json(body, exclude={"resources"})},
        body.resources,
        idempotency_key,
        subject=lambda session: models.get_model(session, model_id),
    )
    return await answer_or_wait(request, services, answer, wait)
