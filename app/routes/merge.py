"""POST /merge, its comparison and conversions to what it takes: checked when it is submitted, done by the pool."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from app.dependencies import AdapterId, IdempotencyKey, JobRunner, ServicesDep, WaitSeconds
from app.job_answers import JOB_RESPONSES, answer_or_wait
from app.json_body import JsonRoute
from app.problems import problem_responses
from app.schemas.common import as_json
from app.schemas.conversion import ConvertRequest
from app.schemas.jobs import Job
from app.schemas.merge import CompareMergesRequest, MergeRequest
from app.submission import submitted
from storage import adapters

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
    answer = await submitted(
        request, services, principal, "merge", as_json(body, exclude={"resources"}), body.resources, idempotency_key
    )
    return await answer_or_wait(request, services, answer, wait)


@router.post(
    "/merge/compare",
    status_code=202,
    summary="Compare merges",
    response_model=Job,
    responses={**JOB_RESPONSES, **problem_responses(409, 413, 415, 429, 507)},
)
async def compare_merges(
    request: Request,
    services: ServicesDep,
    principal: JobRunner,
    body: CompareMergesRequest,
    wait: WaitSeconds,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """The same adapters by several methods: one table of rank, error and energy, pictures, and the winners as adapters.

    The adapters are read once for all candidates. What can not be merged by one of them is refused here.
    """
    answer = await submitted(
        request,
        services,
        principal,
        "merge_compare",
        as_json(body, exclude={"resources"}),
        body.resources,
        idempotency_key,
    )
    return await answer_or_wait(request, services, answer, wait)


@router.post(
    "/adapters/{adapter_id}/convert",
    status_code=202,
    summary="Convert an adapter to a plain LoRA",
    response_model=Job,
    responses={**JOB_RESPONSES, **problem_responses(404, 409, 413, 415, 429, 507)},
)
async def convert_adapter(
    request: Request,
    services: ServicesDep,
    principal: JobRunner,
    adapter_id: AdapterId,
    body: ConvertRequest,
    wait: WaitSeconds,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """AdaLoRA, GLoRA, LoHa, LoKr and VeRA exactly; BOFT, DoRA, IA3, OFT, full differences, and any of them at a smaller
    rank, with the error in the report.

    What was trained beside packed weights (LQ-LoRA) also becomes a model that every program loads, with `to`.
    """
    answer = await submitted(
        request,
        services,
        principal,
        "convert",
        {"adapter": adapter_id, **as_json(body, exclude={"resources"})},
        body.resources,
        idempotency_key,
        subject=lambda session: adapters.get_adapter(session, adapter_id),
    )
    return await answer_or_wait(request, services, answer, wait)
