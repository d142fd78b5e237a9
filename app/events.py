"""Server-sent events of a job: what the database has of it, in order, from any point on."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import structlog
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.concurrency import run_in_threadpool

from app.state import Services
from artifacts.errors import DatabaseUnavailable
from storage import jobs
from storage.tables import TERMINAL_STATES, JobEventRow

POLL_SECONDS = 0.25
KEEPALIVE_SECONDS = 15.0
BATCH = 500
EVENT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "description": "One event of the stream.",
    "required": ["id", "event", "data"],
    "properties": {
        "id": {"type": "string", "description": "Sequence number."},
        "event": {"type": "string", "description": "state, progress, preview or warning"},
        "data": {"type": "string", "description": "JSON: what changed, and `at`, when."},
    },
}
_log = structlog.stdlib.get_logger(__name__)


def _next_events(services: Services, job_id: str, after: int) -> tuple[list[JobEventRow], bool]:
    """The next events, and whether they are the last. The state is read first: what ends a job is written with it."""
    with services.database.read() as session:
        ended = jobs.get_job(session, job_id).state in TERMINAL_STATES
        session.expire_all()
        events = jobs.events_after(session, job_id, after, limit=BATCH)
    return events, ended and len(events) < BATCH


def _encode(event: JobEventRow) -> bytes:
    stamp = event.created_at.isoformat().replace("+00:00", "Z")
    data = json.dumps({**event.data, "at": stamp}, ensure_ascii=False, separators=(",", ":"))
    return format_sse_event(data_str=data, event=event.type, id=str(event.sequence))


async def job_events(services: Services, job_id: str, after: int) -> AsyncIterator[bytes]:
    """The events behind number `after` as they happen, a comment in every quiet 15 seconds, the end with the job's."""
    quiet_since = time.monotonic()
    while True:
        try:
            events, last = await run_in_threadpool(_next_events, services, job_id, after)
        except DatabaseUnavailable as error:
            # Ending the stream is what tells the client to come back with Last-Event-ID.
            _log.warning("events_interrupted", job_id=job_id, detail=error.detail)
            return
        for event in events:
            yield _encode(event)
            after = event.sequence
            quiet_since = time.monotonic()
        if last:
            return
        if time.monotonic() - quiet_since >= KEEPALIVE_SECONDS:
            yield KEEPALIVE_COMMENT
            quiet_since = time.monotonic()
        if len(events) < BATCH:
            await asyncio.sleep(POLL_SECONDS)
