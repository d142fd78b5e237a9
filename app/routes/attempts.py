"""The attempts of a job and their logs."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import Response, StreamingResponse

from app.dependencies import JobId, Reader, ServicesDep
from app.job_logs import log_response
from app.json_body import JsonRoute
from app.problems import problem_responses
from app.schemas.attempts import Attempt, AttemptList, LogQuery
from storage import jobs

router = APIRouter(tags=["jobs"], route_class=JsonRoute)
_LOG_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "What the attempt has written to its standard output and error",
        "content": {"text/plain": {"schema": {"type": "string"}}},
        "headers": {"X-Attempt": {"description": "Number of the attempt.", "schema": {"type": "integer"}}},
    },
    **problem_responses(404),
}


@router.get("/jobs/{job_id}/attempts", summary="List the attempts of a job", responses=problem_responses(404))
def list_attempts(services: ServicesDep, principal: Reader, job_id: JobId) -> AttemptList:
    """The first one first."""
    with services.database.read() as session:
        jobs.get_job(session, job_id)
        return AttemptList(items=[Attempt.of(row) for row in jobs.attempts_of(session, job_id)])


@router.get(
    "/jobs/{job_id}/logs",
    summary="Read the log of an attempt",
    response_class=StreamingResponse,
    responses=_LOG_RESPONSES,
)
async def get_log(
    services: ServicesDep, principal: Reader, job_id: JobId, query: Annotated[LogQuery, Query()]
) -> Response:
    """Of the newest attempt unless another is asked for; with `follow` as it is written, until the attempt has ended.

    While an attempt runs its output is here about a second late. Of a log beyond 16 MiB the beginning and the end are
    kept, with a line in between that says how much was left out.
    """
    return await log_response(services, job_id, query.attempt, follow=query.follow)
