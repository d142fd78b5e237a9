"""The log of an attempt as it is read over HTTP: from the blob store once it is kept there, before that as it grows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.responses import Response, StreamingResponse

from app.state import Services
from artifacts.errors import DatabaseUnavailable
from storage import job_logs
from storage.job_logs import LogState, Piece
from storage.log_text import HEAD_BYTES, MARK_WINDOW, KeptText, mark

MEDIA_TYPE = "text/plain; charset=utf-8"
POLL_SECONDS = 0.25
OUTAGE_SECONDS = 60.0
# How long after its end an attempt's log may still come: one without a piece so far is most likely empty.
KEPT_WITHIN_SECONDS = 15.0
EMPTY_AFTER_SECONDS = 2.0
BATCH = 16


async def log_response(services: Services, job_id: str, attempt: int | None, *, follow: bool) -> Response:
    """The log of this attempt, by default of the newest one; with `follow` until the attempt has ended.

    Raises:
        NotFound: no such job or attempt, or the job has not run.
        BlobMissing, BlobStoreUnavailable: the log is kept but can not be had.
    """
    state, pieces = await run_in_threadpool(_look, services, job_id, attempt, 0)
    if state.ended_since is not None:
        state = await _await_kept(services, job_id, state, bool(pieces))
    headers = {"X-Attempt": str(state.attempt), "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    if state.sha256 is not None:
        size = await run_in_threadpool(services.blobs.size, state.sha256)
        chunks = await run_in_threadpool(services.blobs.stream, state.sha256)
        return StreamingResponse(chunks, headers={**headers, "Content-Length": str(size)}, media_type=MEDIA_TYPE)
    if follow and state.ended_since is None:
        body = _follow(services, job_id, state.attempt)
    else:
        body = iterate_in_threadpool(_so_far(services, job_id, state.attempt))
    return StreamingResponse(body, headers=headers, media_type=MEDIA_TYPE)


def _look(services: Services, job_id: str, attempt: int | None, offset: int) -> tuple[LogState, list[Piece]]:
    """The state is read first: whoever drops the pieces has noted the blob in the same transaction."""
    with services.database.read() as session:
        state = job_logs.log_state(session, job_id, attempt)
        return state, job_logs.pieces_from(session, job_id, state.attempt, offset, BATCH)


def _may_come(state: LogState, any_pieces: bool) -> bool:
    """Whether the log of an attempt that has ended is likely on its way to the blob store."""
    if state.sha256 is not None or state.ended_since is None:
        return False
    return state.ended_since < (KEPT_WITHIN_SECONDS if any_pieces else EMPTY_AFTER_SECONDS)


async def _await_kept(services: Services, job_id: str, state: LogState, any_pieces: bool) -> LogState:
    while _may_come(state, any_pieces):
        await asyncio.sleep(POLL_SECONDS)
        state, _ = await run_in_threadpool(_look, services, job_id, state.attempt, 0)
    return state


def _encode(pieces: list[Piece], offset: int) -> Iterator[bytes]:
    """The pieces behind `offset`, and a mark for what is missing between them."""
    for piece in pieces:
        if piece.offset > offset:
            yield mark(piece.offset - offset).encode()
        yield piece.text.encode()
        offset = piece.end


def _so_far(services: Services, job_id: str, attempt: int) -> Iterator[bytes]:
    """What is in the database now, or in the blob store if it goes there meanwhile."""
    offset = 0
    while True:
        state, pieces = _look(services, job_id, attempt, offset)
        if state.sha256 is not None:
            yield from _rest_of_kept(services, state.sha256, offset)
            return
        yield from _encode(pieces, offset)
        if len(pieces) < BATCH:
            return
        offset = pieces[-1].end


async def _follow(services: Services, job_id: str, attempt: int) -> AsyncIterator[bytes]:
    """What is there and what comes, until the attempt has ended and its last bytes are out.

    While the database is away the stream waits; after `OUTAGE_SECONDS` it breaks, which no client takes for the end.
    """
    offset = 0
    seen_at = time.monotonic()
    while True:
        try:
            state, pieces = await run_in_threadpool(_look, services, job_id, attempt, offset)
        except DatabaseUnavailable:
            if time.monotonic() - seen_at > OUTAGE_SECONDS:
                raise
            await asyncio.sleep(POLL_SECONDS)
            continue
        seen_at = time.monotonic()
        if state.sha256 is not None:
            async for chunk in iterate_in_threadpool(_rest_of_kept(services, state.sha256, offset)):
                yield chunk
            return
        for chunk in _encode(pieces, offset):
            yield chunk
        if pieces:
            offset = pieces[-1].end
        if len(pieces) == BATCH:
            continue
        if state.ended_since is not None and not _may_come(state, offset > 0):
            return
        await asyncio.sleep(POLL_SECONDS)


def _rest_of_kept(services: Services, sha256: str, offset: int) -> Iterator[bytes]:
    """What is kept of the log behind its byte `offset`."""
    size = services.blobs.size(sha256)
    probe = b"".join(services.blobs.stream(sha256, HEAD_BYTES, HEAD_BYTES + MARK_WINDOW)) if size > HEAD_BYTES else b""
    missing, start = KeptText.of(size, probe).resume(offset)
    if missing:
        yield mark(missing).encode()
    yield from services.blobs.stream(sha256, start)
