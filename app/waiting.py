"""`Prefer: wait` (RFC 7240): holding an answer back until the job has ended."""

from __future__ import annotations

import asyncio
import re
import time

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from app.state import Services
from storage import jobs
from storage.tables import TERMINAL_STATES

_WAIT = re.compile(r'\s*wait\s*=\s*"?(\d{1,6})"?\s*', re.IGNORECASE)
_FIRST_POLL, _LONGEST_POLL = 0.05, 0.5


def parse_prefer(header: str | None) -> float:
    """Seconds of the `wait` preference; 0 without one. Unknown preferences are ignored, as the RFC asks."""
    for part in (header or "").split(","):
        if match := _WAIT.fullmatch(part.partition(";")[0]):
            return float(match.group(1))
    return 0.0


def _has_ended(services: Services, job_id: str) -> bool:
    with services.database.read() as session:
        return jobs.get_job(session, job_id).state in TERMINAL_STATES


async def wait_for_job(request: Request, services: Services, job_id: str, seconds: float) -> bool:
    """Whether the job ends within `seconds`; gives up early when the client leaves.

    The job runs in another process, perhaps on another machine: only the database can tell, so it is asked, at
    first every 50 ms and then ever less often.
    """
    deadline = time.monotonic() + seconds
    pause = _FIRST_POLL
    while True:
        if await run_in_threadpool(_has_ended, services, job_id):
            return True
        left = deadline - time.monotonic()
        if left <= 0 or await request.is_disconnected():
            return False
        await asyncio.sleep(min(pause, left))
        pause = min(pause * 1.5, _LONGEST_POLL)
