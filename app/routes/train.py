"""POST /train: checked when it is submitted, done by the pool; and what a training measured on the way."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from app.dependencies import IdempotencyKey, JobId, JobRunner, Reader, ServicesDep, WaitSeconds
from app.job_answers import JOB_RESPONSES, answer_or_wait
from app.json_body import JsonRoute
from app.problems import problem_responses
from app.schemas.federations import RoundList
from app.schemas.jobs import Job
from app.schemas.train import MetricSeries, TrainEstimate, TrainRequest
from app.submission import submitted
from app.train_inputs import estimate_training
from artifacts.svg import MEDIA_TYPE
from storage import federations
from storage.job_metrics import LARGEST_STEP, metrics_after, thinned
from train.loss_curve import draw

router = APIRouter(tags=["train"], route_class=JsonRoute)

CURVE_POINTS = 1000


@router.post(
    "/train",
    status_code=202,
    summary="Train an adapter",
    response_model=Job,
    responses={**JOB_RESPONSES, **problem_responses(409, 413, 415, 429, 507)},
)
async def train_adapter(
    request: Request,
    services: ServicesDep,
    principal: JobRunner,
    body: TrainRequest,
    wait: WaitSeconds,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """A base model and a dataset in, one adapter out.

    What can never be trained (unknown layers, a rank that fits none, more memory than there is) is refused here, not
    later in the queue. An interrupted training goes on from its newest checkpoint. With `transferable` the job also
    trains a discriminator, which stays with the adapter and is shown to nobody.
    """
    answer = await submitted(
        request,
        services,
        principal,
        "train",
        body.params(),
        body.resources,
        idempotency_key,
        sealed=body.sealed(),
    )
    return await answer_or_wait(request, services, answer, wait)


@router.post(
    "/train/estimate",
    summary="Estimate what a training takes",
    responses=problem_responses(413, 415),
)
def estimate_train(services: ServicesDep, principal: Reader, body: TrainRequest) -> TrainEstimate:
    """Takes the body of `POST /train` and creates nothing."""
    with services.database.read() as session:
        return TrainEstimate.of(estimate_training(session, body))


@router.get("/jobs/{job_id}/metrics", summary="Read what a job measures", responses=problem_responses(404))
def get_metrics(
    services: ServicesDep,
    principal: Reader,
    job_id: JobId,
    after: Annotated[int, Query(ge=0, le=LARGEST_STEP, description="Only steps behind this one.")] = 0,
    limit: Annotated[int, Query(ge=1, le=5000, description="Most steps of one answer.")] = 1000,
) -> MetricSeries:
    """Loss, learning rate, gradient norm and the method's own numbers of each step, also while the job runs."""
    with services.database.read() as session:
        return MetricSeries.of(metrics_after(session, job_id, after, limit), limit)


@router.get(
    "/jobs/{job_id}/loss-curve",
    summary="See the loss of a training",
    response_class=Response,
    responses={200: {"content": {MEDIA_TYPE: {"schema": {"type": "string"}}}}, **problem_responses(404)},
)
def get_loss_curve(services: ServicesDep, principal: Reader, job_id: JobId) -> Response:
    """A picture (SVG) of the loss and the learning rate over the steps, as far as the training has come."""
    with services.database.read() as session:
        points = thinned(session, job_id, CURVE_POINTS)
    series = [(point.step, point.numbers) for point in points]
    return Response(draw(series, job_id), media_type=MEDIA_TYPE)


@router.get(
    "/jobs/{job_id}/rounds", summary="List the rounds of a federated training", responses=problem_responses(404)
)
def list_rounds(
    services: ServicesDep,
    principal: Reader,
    job_id: JobId,
    after: Annotated[int, Query(ge=0, le=LARGEST_STEP, description="Only rounds behind this one.")] = 0,
    limit: Annotated[int, Query(ge=1, le=100, description="Most rounds of one answer.")] = 20,
) -> RoundList:
    """Which clients were asked in each round, what became of them, and the ε that each has spent."""
    with services.database.read() as session:
        return RoundList.of(federations.rounds_after(session, job_id, after, limit), limit)
