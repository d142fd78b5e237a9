"""POST /compose-image: checked when it is submitted, done by the pool; the answer is the job, or the image itself."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.dependencies import IdempotencyKey, JobId, JobRunner, Reader, ServicesDep, WaitSeconds
from app.image_answers import PNG, answer_image_or_job
from app.job_answers import JOB_RESPONSES
from app.json_body import JsonRoute
from app.problems import problem_responses
from app.schemas.common import as_json
from app.schemas.compose import CompareRequest, ComposeRequest
from app.schemas.jobs import Job
from app.submission import submitted
from storage import previews

router = APIRouter(tags=["compose"], route_class=JsonRoute)

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_RESPONSES = {
    **JOB_RESPONSES,
    200: {**JOB_RESPONSES[200], "content": {PNG: _BINARY}},
    **problem_responses(404, 409, 413, 415, 429, 507),
}


@router.post("/compose-image", status_code=202, summary="Compose an image", response_model=Job, responses=_RESPONSES)
async def compose_image(
    request: Request,
    services: ServicesDep,
    principal: JobRunner,
    body: ComposeRequest,
    wait: WaitSeconds,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Several concept adapters and styles in, one image out, in which every concept appears.

    What can not be made (a noun that is not in the prompt, adapters of another base model, numbers out of range) is
    refused here. With `Accept: image/png` and `Prefer: wait=60` the answer is the image, if it is made in time.
    """
    answer = await submitted(
        request, services, principal, "compose", as_json(body, exclude={"resources"}), body.resources, idempotency_key
    )
    return await answer_image_or_job(request, services, answer, wait)


@router.post(
    "/compose-image/compare",
    status_code=202,
    summary="Compare methods on one image",
    response_model=Job,
    responses=_RESPONSES,
)
async def compare_images(
    request: Request,
    services: ServicesDep,
    principal: JobRunner,
    body: CompareRequest,
    wait: WaitSeconds,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """The same scene by several methods, from the same seed and noise: each image, and before them a sheet of all.

    With `Accept: image/png` and `Prefer: wait=60` the answer is the sheet, if it is made in time.
    """
    answer = await submitted(
        request, services, principal, "compare", as_json(body, exclude={"resources"}), body.resources, idempotency_key
    )
    return await answer_image_or_job(request, services, answer, wait)


@router.get(
    "/jobs/{job_id}/preview",
    summary="See how far an image is",
    response_class=Response,
    responses={200: {"content": {"image/jpeg": _BINARY}}, **problem_responses(404)},
)
def get_preview(services: ServicesDep, principal: Reader, job_id: JobId) -> Response:
    """The newest preview of a job that runs; each is told by a `preview` event."""
    with services.database.read() as session:
        row = previews.get_preview(session, job_id)
        headers = {"Cache-Control": "no-store", "Rankwise-Step": str(row.step)}
        return Response(row.data, media_type=row.media_type, headers=headers)
