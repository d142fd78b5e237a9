"""Schedules: make, list, show, change, delete, trigger, look ahead and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from app.dependencies import IdempotencyKey, JobRunner, Paging, Reader, ScheduleId, ServicesDep, WaitSeconds
from app.fleets import check_fleet
from app.idempotency import Answer, answer_once, request_key
from app.job_answers import JOB_RESPONSES, accepted, answer_or_wait
from app.job_kinds import check_submission
from app.json_body import JsonRoute
from app.preconditions import IfMatch, etag
from app.problems import problem_responses
from app.scheduling import submit_scheduled
from app.schemas.common import PageOf, as_json
from app.schemas.fleets import FiringDetail, FleetProgress
from app.schemas.jobs import Job
from app.schemas.schedules import (
    Firing,
    ScheduledJob,
    SchedulePatch,
    ScheduleRequest,
    ScheduleResource,
    Upcoming,
)
from app.state import Services
from artifacts.pointers import pointers_below
from storage import database as clock
from storage import firings, fleets, jobs, schedules
from storage.schedules import JobTemplate
from storage.tables import JobRow, ScheduleRow

router = APIRouter(tags=["schedules"], route_class=JsonRoute)
_ETAG = {"ETag": {"description": "The version, for If-Match.", "schema": {"type": "string"}}}
_LOCATION = {"Location": {"description": "Path of the schedule.", "schema": {"type": "string"}}}
Number = Annotated[int, Query(ge=1, le=100, description="How many firings to list.")]


@router.post(
    "/schedules",
    status_code=201,
    summary="Make a schedule",
    response_model=ScheduleResource,
    responses={
        201: {"description": "Made", "headers": {**_LOCATION, **_ETAG}},
        **problem_responses(409, 413, 415, 507),
    },
)
def create_schedule(
    services: ServicesDep, principal: JobRunner, body: ScheduleRequest, idempotency_key: IdempotencyKey = None
) -> JSONResponse:
    """A job that is made again and again: at the times of a cron expression, or at every event.

    The job is checked now, as if it were submitted now, and again at each firing.
    """

    def act(session: Session) -> Answer:
        row = schedules.create_schedule(
            session,
            body.trigger.trigger(),
            _checked(services, session, body.job),
            name=body.name,
            overlap=body.overlap,
            misfire=body.misfire,
            enabled=body.enabled,
            pace=body.pace(),
            created_by=principal.key_id,
        )
        headers = {"Location": f"/schedules/{row.id}", "ETag": etag(row.version)}
        return Answer(201, ScheduleResource.of(row).body(), headers)

    key = request_key(principal.owner, idempotency_key, "POST /schedules", as_json(body))
    return answer_once(services, key, act).response()


@router.get(
    "/schedules", summary="List schedules", response_model=PageOf[ScheduleResource], responses=problem_responses()
)
def list_schedules(services: ServicesDep, principal: Reader, query: Paging) -> JSONResponse:
    """Newest first."""
    with services.database.read() as session:
        page = schedules.list_schedules(session, cursor=query.cursor, limit=query.limit)
        items = [ScheduleResource.of(row).body() for row in page.items]
    return JSONResponse({"items": items, "next": page.next})


@router.get(
    "/schedules/{schedule_id}",
    summary="Show a schedule",
    response_model=ScheduleResource,
    responses={200: {"headers": _ETAG}, **problem_responses(404)},
)
def get_schedule(services: ServicesDep, principal: Reader, schedule_id: ScheduleId) -> JSONResponse:
    """With its version as ETag."""
    with services.database.read() as session:
        return _shown(schedules.get_schedule(session, schedule_id))


@router.patch(
    "/schedules/{schedule_id}",
    summary="Change a schedule",
    response_model=ScheduleResource,
    responses={200: {"headers": _ETAG}, **problem_responses(404, 412, 413, 415, 507)},
)
def patch_schedule(
    services: ServicesDep, principal: JobRunner, schedule_id: ScheduleId, body: SchedulePatch, if_match: IfMatch
) -> JSONResponse:
    """What is left out stays. With another trigger, or enabled again, its next firing is computed from now on."""
    with services.database.write() as session:
        row = schedules.update_schedule(
            session,
            schedule_id,
            name=body.name,
            trigger=None if body.trigger is None else body.trigger.trigger(),
            job=None if body.job is None else _checked(services, session, body.job),
            overlap=body.overlap,
            misfire=body.misfire,
            enabled=body.enabled,
            max_parallel=body.max_parallel,
            window=None if body.window is None else body.window.document(),
            unset=body.unset(),
            if_version=if_match,
        )
        return _shown(row)


@router.delete(
    "/schedules/{schedule_id}",
    status_code=204,
    summary="Delete a schedule",
    responses=problem_responses(404, 412, 507),
)
def delete_schedule(
    services: ServicesDep, principal: JobRunner, schedule_id: ScheduleId, if_match: IfMatch
) -> Response:
    """It fires no more; the jobs that it made stay."""
    with services.database.write() as session:
        schedules.delete_schedule(session, schedule_id, if_version=if_match)
    return Response(status_code=204)


@router.post(
    "/schedules/{schedule_id}/trigger",
    status_code=202,
    summary="Run a schedule's job now",
    response_model=Job | FiringDetail,
    responses={**JOB_RESPONSES, **problem_responses(404, 409, 413, 429, 507)},
)
async def trigger_schedule(
    request: Request,
    services: ServicesDep,
    principal: JobRunner,
    schedule_id: ScheduleId,
    wait: WaitSeconds,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """Also while it is disabled; its times stay as they are.

    The overlap policy applies: with `skip`, 409 while a job of the schedule is unfinished. The job belongs to the
    caller, not to who made the schedule.

    Of a fleet, the answer is the firing with all its adapters waiting; their jobs belong to who made the schedule. A
    fleet of a disabled schedule is refused (409).
    """
    request_id: str = request.state.request_id

    def submit(session: Session, row: ScheduleRow) -> JobRow:
        return submit_scheduled(services.settings, session, row, created_by=principal.key_id, request_id=request_id)

    def act(session: Session) -> Answer:
        firing = firings.trigger_now(session, schedule_id, submit)
        if firing.job_id is not None:
            return accepted(session, jobs.get_job(session, firing.job_id))
        found = FiringDetail.of(firing)
        found.fleet = FleetProgress.of(fleets.figures(session, firing))
        return Answer(202, as_json(found), {"Location": f"/schedules/{schedule_id}/firings/{firing.occurrence}"})

    key = request_key(principal.owner, idempotency_key, f"POST /schedules/{schedule_id}/trigger", None)
    answer = await run_in_threadpool(answer_once, services, key, act)
    if "kind" not in answer.body:
        return answer.response()
    if not answer.replayed:
        services.job_made(answer.body["kind"])
    return await answer_or_wait(request, services, answer, wait)


@router.get(
    "/schedules/{schedule_id}/upcoming",
    summary="List a schedule's next firings",
    responses=problem_responses(404),
)
def list_upcoming(services: ServicesDep, principal: Reader, schedule_id: ScheduleId, n: Number = 5) -> Upcoming:
    """In UTC and as the clocks of its time zone show them, with the trigger in words."""
    with services.database.read() as session:
        return Upcoming.of(schedules.get_schedule(session, schedule_id), clock.now(session), n)


@router.get(
    "/schedules/{schedule_id}/firings",
    summary="List a schedule's past firings",
    responses=problem_responses(404),
)
def list_firings(services: ServicesDep, principal: Reader, schedule_id: ScheduleId, query: Paging) -> PageOf[Firing]:
    """Newest first: the job that came of each, or why none did."""
    with services.database.read() as session:
        page = firings.list_firings(session, schedule_id, cursor=query.cursor, limit=query.limit)
        return PageOf[Firing](items=[Firing.of(row) for row in page.items], next=page.next)


def _checked(services: Services, session: Session, job: ScheduledJob) -> JobTemplate:
    """The job, if it could be submitted now. Errors point into /job."""
    resources: Mapping[str, Any] = job.asked()
    with pointers_below("/job"):
        if job.selector is not None:
            return check_fleet(services.settings, session, job.kind, job.selector, job.params, resources)
        wanted = check_submission(services.settings, session, job.kind, job.params, resources)
    return JobTemplate(wanted.kind, wanted.params, wanted.resources)


def _shown(row: ScheduleRow) -> JSONResponse:
    return JSONResponse(ScheduleResource.of(row).body(), headers={"ETag": etag(row.version)})
