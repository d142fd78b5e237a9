"""POST /transfer: checked when it is submitted, done by the pool; and transfers with their reports and decisions."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.responses import HTMLResponse, JSONResponse, Response

from app import transfer_page
from app.content_choice import prefers
from app.dependencies import HEX_ID, IdempotencyKey, JobId, JobRunner, Reader, ServicesDep, WaitSeconds
from app.idempotency import Answer, answer_once, request_key
from app.job_answers import JOB_RESPONSES, answer_or_wait
from app.json_body import JsonRoute
from app.problems import problem_responses
from app.schemas.common import PageOf, as_json
from app.schemas.jobs import Job
from app.schemas.transfer import DecisionRequest, Transfer, TransferQuery, TransferReport, TransferRequest
from app.transfer_submission import submit_transfer
from artifacts.errors import StateConflict
from storage import jobs, transfers
from storage.job_metrics import thinned
from storage.tables import TransferRow
from storage.transfers import TransferFilter

router = APIRouter(tags=["transfer"], route_class=JsonRoute)


class _JobConvertor(StringConvertor):
    """The id of a job, and no other word that may stand in its place, such as `plan`."""

    regex = f"job_{HEX_ID}"


register_url_convertor("job", _JobConvertor())

CURVE_POINTS = 1000


@router.post(
    "/transfer",
    status_code=202,
    summary="Move an adapter to another base model",
    response_model=Job,
    responses={**JOB_RESPONSES, **problem_responses(409, 413, 415, 429, 507)},
)
async def transfer_adapter(
    request: Request,
    services: ServicesDep,
    principal: JobRunner,
    body: TransferRequest,
    wait: WaitSeconds,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """An adapter in, one for another base model out; its training data is not needed.

    Published is what the gate lets pass; what it holds waits for a decision. A request that does what an earlier one
    does is answered with that one's job (200), unless it failed: then the new job goes on where it stopped.
    """
    answer = await run_in_threadpool(
        submit_transfer,
        services,
        principal,
        body,
        idempotency_key=idempotency_key,
        request_id=request.state.request_id,
    )
    return await answer_or_wait(request, services, answer, wait)


@router.get("/transfers", summary="List transfers", responses=problem_responses())
def list_transfers(
    services: ServicesDep, principal: Reader, query: Annotated[TransferQuery, Query()]
) -> PageOf[Transfer]:
    """Newest first. `verdict=hold` are those that wait for a decision, and those that waited."""
    chosen = TransferFilter(
        adapter_id=query.adapter,
        source_model=query.source_model,
        target_model=query.target_model,
        schedule_id=query.schedule,
        verdict=query.verdict,
        state=query.state,
    )
    with services.database.read() as session:
        page = transfers.list_transfers(session, chosen, cursor=query.cursor, limit=query.limit)
        known = transfers.jobs_of(session, page.items)
        return PageOf[Transfer](items=[Transfer.of(row, known[row.job_id]) for row in page.items], next=page.next)


@router.get("/transfers/{job_id:job}", summary="Show a transfer", responses=problem_responses(404))
def get_transfer(services: ServicesDep, principal: Reader, job_id: JobId) -> Transfer:
    with services.database.read() as session:
        return _shown(session, transfers.get_transfer(session, job_id))


@router.get(
    "/transfers/{job_id:job}/report",
    summary="Read what a transfer measured",
    response_model=TransferReport,
    responses={
        200: {"content": {transfer_page.MEDIA_TYPE: {"schema": {"type": "string"}}}},
        **problem_responses(404, 409),
    },
)
def get_transfer_report(request: Request, services: ServicesDep, principal: Reader, job_id: JobId) -> Response:
    """Scores with intervals, the gate, acceptance, negative flips, controls: counts and rates, and no text.

    With `Accept: text/html` it is a page with plots.
    """
    with services.database.read() as session:
        shown = as_json(_shown(session, transfers.get_transfer(session, job_id)))
        report = _report(session, job_id)
        points = thinned(session, job_id, CURVE_POINTS)
    headers = {"Vary": "Accept"}
    if not prefers(request, transfer_page.MEDIA_TYPE):
        return JSONResponse({"transfer": shown, "report": report}, headers=headers)
    losses = [(point.step, point.numbers) for point in points]
    return HTMLResponse(transfer_page.page(shown, report, losses), headers={**transfer_page.HEADERS, **headers})


@router.post(
    "/transfers/{job_id:job}/decision",
    summary="Publish or drop an adapter that the gate holds",
    response_model=Transfer,
    responses=problem_responses(404, 409, 413, 415, 429, 507),
)
def decide_transfer(
    services: ServicesDep,
    principal: JobRunner,
    job_id: JobId,
    body: DecisionRequest,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """The same decision again gives the same answer; another one is refused: it is final."""

    def act(session: Session) -> Answer:
        row = transfers.decide(session, job_id, body.decision, by=principal.key_id, reason=body.reason)
        return Answer(200, as_json(_shown(session, row)))

    key = request_key(principal.owner, idempotency_key, f"POST /transfers/{job_id}/decision", as_json(body))
    return answer_once(services, key, act).response()


def _shown(session: Session, row: TransferRow) -> Transfer:
    return Transfer.of(row, jobs.get_job(session, row.job_id))


def _report(session: Session, job_id: str) -> dict[str, Any]:
    """Raises StateConflict while there is none."""
    job = jobs.get_job(session, job_id)
    if job.result is None:
        raise StateConflict(
            f"{job_id} is {job.state} and has no report",
            hint="It is there when the job has succeeded; GET /jobs/{id} tells how far it is, or why it failed.",
        )
    report: dict[str, Any] = job.result["report"]
    return report
