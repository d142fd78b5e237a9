"""Fleets at work: one transfer for each adapter that a selector chooses, checked and made as any other submission."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy.orm import Session

from app import capacity
from app.base_models import base_model
from app.job_kinds import check_submission
from app.job_making import make_job
from app.request_parts import parse_part
from app.schemas.common import as_json
from app.schemas.fleets import FleetPlan, FleetSelector, PlanItem, TransferCost
from app.schemas.resources import Resources
from app.schemas.transfer import FleetParams, TransferParams
from app.settings import Settings
from app.transfer_costs import cost_of, mean_seconds, total_cost
from artifacts.errors import FieldError, RankwiseError, RequestInvalid
from artifacts.menu import accepted_parameters
from artifacts.pointers import pointers_below
from storage import datasets, selectors, transfers
from storage.database import Database
from storage.fleets import MadeJob, fleet_selector
from storage.schedules import JobTemplate
from storage.selectors import Chosen
from storage.tables import JobRow, ScheduleRow, TransferRow
from transfer.catalog import parse_parameters

KIND = "transfer"
PLANNED = 500
"""Adapters that a plan looks at one by one."""


def check_fleet(
    settings: Settings,
    session: Session,
    kind: str,
    selector: FleetSelector,
    params: Mapping[str, Any],
    resources: Mapping[str, Any],
) -> JobTemplate:
    """What is the same for all adapters of a fleet, with the models by their ids. Each adapter is checked by itself.

    Raises:
        RequestInvalid and its kin: at `/kind`, `/selector/…`, `/params/…` or `/resources/…`.
    """
    if kind != KIND:
        raise _invalid("/selector", f"belongs to the kind {KIND}, not to {kind[:24]!r}")
    if "adapter" in params:
        raise _invalid("/params/adapter", "is chosen by the selector")
    asked = as_json(parse_part(Resources, resources, "/resources"), exclude_none=True)
    capacity.check_devices(session, settings, kind, asked)
    request = parse_part(FleetParams, params, "/params")
    with pointers_below("/params"):
        parse_parameters(request.method, request.parameters)
    source = base_model(session, selector.base_model, pointer="/selector/base_model")
    target = base_model(session, request.target_model, pointer="/params/target_model")
    if source.id == target.id:
        raise _invalid("/params/target_model", "is the base model that the adapters are to leave")
    document = as_json(request.model_copy(update={"target_model": target.id}))
    chosen = as_json(selector.model_copy(update={"base_model": source.id}), exclude_none=True)
    return JobTemplate(KIND, document, asked, chosen)


def submit_item(settings: Settings, session: Session, row: ScheduleRow, adapter_id: str) -> MadeJob:
    """Check and create a schedule's job for one adapter.

    Raises:
        RequestInvalid and its kin: it can not be moved this way.
        QueueFull, QuotaExceeded
    """
    params = {**row.job_params, "adapter": adapter_id}
    with accepted_parameters():
        wanted = check_submission(settings, session, row.job_kind, params, row.job_resources)
    return MadeJob(*make_job(settings, session, wanted, created_by=row.created_by, schedule_id=row.id))


def plan_fleet(settings: Settings, database: Database, template: JobTemplate) -> FleetPlan:
    """What a firing with this job would do now. Everything is checked as it would be then, and nothing is kept.

    Raises:
        NotFound: the base model of the selector is gone.
    """
    selector = fleet_selector(template.selector or {}, template.params)
    with database.read() as session:
        total = selectors.count(session, selector)
        chosen = selectors.choose(session, selector, PLANNED)
    # An adapter a transaction, since checking one locks it; other submissions come in between.
    items = [_planned(settings, database, template, adapter) for adapter in chosen]
    moving = [item for item in items if item.moves]
    with database.read() as session:
        mean, measured = mean_seconds(
            session, selector.base_model, template.params["target_model"], template.params["method"]
        )
    return FleetPlan(
        total=total,
        truncated=total > len(items),
        moves=len(moving),
        reasons=dict(Counter(item.code for item in items if item.code is not None)),
        cost=total_cost([item.cost for item in moving if item.cost is not None]),
        seconds=None if mean is None else mean * len(moving),
        measured=measured,
        items=items,
    )


def _planned(settings: Settings, database: Database, template: JobTemplate, adapter: Chosen) -> PlanItem:
    known: dict[str, Any] = {"adapter": adapter.id, "adapter_name": adapter.name}
    stays = {"moves": False, "hint": None, "job_id": None, "cost": None}
    try:
        with _discarded(database) as session, accepted_parameters():
            params = {**template.params, "adapter": adapter.id}
            wanted = check_submission(settings, session, template.kind, params, template.resources)
            assert wanted.transfer is not None
            same = transfers.find_same(session, wanted.transfer.facts.request_key)
            if same is not None and not transfers.may_be_repeated(same[1]):
                code, detail = _sameness(*same)
                return PlanItem(**known, **stays | {"code": code, "detail": detail, "job_id": same[1].id})
            cost = _cost(session, wanted.transfer.params)
            return PlanItem(**known, moves=True, code=None, detail=None, hint=None, job_id=None, cost=cost)
    except RankwiseError as error:
        if error.status >= 500:
            raise
        return PlanItem(**known, **stays | {"code": error.code, "detail": error.detail, "hint": error.hint})


def _sameness(row: TransferRow, job: JobRow) -> tuple[str, str]:
    if job.state != "succeeded":
        return "under_way", f"{job.id} does the same and is {job.state}"
    if row.new_adapter is not None:
        return "already_moved", f"{job.id} has made {row.new_adapter} of it"
    return "already_judged", f"{job.id} did the same, and the gate said {row.verdict}"


def _cost(session: Session, params: TransferParams) -> TransferCost:
    rows = {
        name: 0 if dataset is None else datasets.get_dataset(session, dataset).rows
        for name, dataset in (("inputs", params.inputs), ("holdout", params.holdout))
    }
    seeds = 0 if params.seeds is None else params.seeds.count
    options = parse_parameters(params.method, params.parameters)
    return cost_of(options, **rows, seeds=seeds, controls=len(params.controls))


@contextmanager
def _discarded(database: Database) -> Iterator[Session]:
    """A session whose locks and changes are gone at its end."""
    with database.write() as session:
        try:
            yield session
        finally:
            session.rollback()


def _invalid(pointer: str, problem: str) -> RequestInvalid:
    return RequestInvalid(f"{pointer} {problem}", errors=[FieldError(pointer, problem)])
