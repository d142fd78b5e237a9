"""Fleets of transfers: what a firing has made of each adapter, and what one would make of them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from app.dependencies import PLAIN, Paging, Reader, ScheduleId, ServicesDep
from app.fleets import KIND, check_fleet, plan_fleet
from app.json_body import JsonRoute
from app.problems import problem_responses
from app.schemas.common import as_json
from app.schemas.fleets import FiringDetail, FleetItem, FleetPlan, FleetProgress, PlanRequest
from artifacts.errors import StateConflict
from storage import fleets, schedules
from storage.schedules import JobTemplate

router = APIRouter(tags=["schedules"], route_class=JsonRoute)
Occurrence = Annotated[
    str, Path(min_length=1, max_length=80, pattern=PLAIN, description="`occurrence` of the firing, percent-encoded.")
]


@router.get("/schedules/{schedule_id}/firings/{occurrence}", summary="Show a firing", responses=problem_responses(404))
def get_firing(
    services: ServicesDep, principal: Reader, schedule_id: ScheduleId, occurrence: Occurrence, query: Paging
) -> FiringDetail:
    """Of a fleet: how far it is in all, and adapter by adapter the job, the gate's verdict and the new adapter."""
    with services.database.read() as session:
        schedules.get_schedule(session, schedule_id)
        row = fleets.get_firing(session, schedule_id, occurrence)
        found = FiringDetail.of(row)
        if row.outcome == "fleet":
            found.fleet = FleetProgress.of(fleets.figures(session, row))
            page = fleets.list_items(session, row, cursor=query.cursor, limit=query.limit)
            jobs, moves = fleets.jobs_of(session, page.items)
            found.items = [
                FleetItem.of(item, jobs.get(item.job_id or ""), moves.get(item.job_id or "")) for item in page.items
            ]
            found.next = page.next
        return found


@router.post(
    "/schedules/{schedule_id}/dry-run",
    summary="See what a schedule's fleet would do now",
    responses=problem_responses(404, 409),
)
def dry_run_schedule(services: ServicesDep, principal: Reader, schedule_id: ScheduleId) -> FleetPlan:
    """Which adapters would be moved, which not and why, and what it would cost. Nothing is made."""
    with services.database.read() as session:
        row = schedules.get_schedule(session, schedule_id)
    if row.job_selector is None:
        raise StateConflict(
            f"{schedule_id} makes one {row.job_kind}; there is no fleet to plan",
            hint="A job with a `selector` makes a fleet.",
        )
    template = JobTemplate(row.job_kind, row.job_params, row.job_resources, row.job_selector)
    return plan_fleet(services.settings, services.database, template)


@router.post(
    "/transfers/plan",
    summary="See what a fleet of transfers would do now",
    responses=problem_responses(413, 415),
)
def plan_transfers(services: ServicesDep, principal: Reader, body: PlanRequest) -> FleetPlan:
    """As a dry run of a schedule that is not there: which adapters would be moved, which not and why, at what cost."""
    resources = {} if body.resources is None else as_json(body.resources, exclude_none=True)
    with services.database.read() as session:
        template = check_fleet(services.settings, session, KIND, body.selector, as_json(body.params), resources)
    return plan_fleet(services.settings, services.database, template)
