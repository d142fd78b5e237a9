"""How a call that makes a job answers: 202 with the job, or 200 with the finished one for who waits."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse

from app.idempotency import Answer
from app.schemas.jobs import Job
from app.state import Services
from app.waiting import wait_for_job
from storage import jobs
from storage.tables import JobRow

_LOCATION = {"Location": {"description": "Path of the job.", "schema": {"type": "string"}}}
JOB_RESPONSES: dict[int | str, dict[str, Any]] = {
    202: {"description": "The job is queued", "headers": _LOCATION},
    200: {
        "description": "The job has ended while the client waited",
        "model": Job,
        "headers": {**_LOCATION, "Preference-Applied": {"schema": {"type": "string"}}},
    },
}


def accepted(session: Session, job: JobRow) -> Answer:
    """202 with the job and where to find it again."""
    return Answer(202, Job.of(session, job).body(), {"Location": f"/jobs/{job.id}"})


def job_body(services: Services, job_id: str) -> Any:
    """The job as it is now. Raises NotFound."""
    with services.database.read() as session:
        return Job.in_full(session, jobs.get_job(session, job_id), services.settings.lease_seconds).body()


async def answer_or_wait(request: Request, services: Services, answer: Answer, seconds: float) -> JSONResponse:
    """`answer`, or after at most `seconds` the job that it announces as 200, if that has ended by then."""
    job_id: str = answer.body["id"]
    if seconds <= 0 or not await wait_for_job(request, services, job_id, seconds):
        return answer.response()
    body = await run_in_threadpool(job_body, services, job_id)
    finished = Answer(200, body, answer.headers, answer.replayed)
    return finished.response(**{"Preference-Applied": "wait"})
