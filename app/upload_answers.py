"""An upload from its first byte to the answer: streamed to disk, stored in a thread, counted by how it ended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import anyio.to_thread
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from app.auth import Principal
from app.idempotency import Answer
from app.state import Services
from app.uploads import Upload, receive_upload
from artifacts.errors import RankwiseError

Store = Callable[[Services, Upload, Principal, str | None], Answer]


async def answer_upload(
    request: Request,
    services: Services,
    principal: Principal,
    idempotency_key: str | None,
    store: Store,
    text_fields: frozenset[str],
    chunks: AsyncIterator[bytes] | None = None,
) -> JSONResponse:
    """Receive the multipart body and hand it to `store`, of which only a few run at once.

    Args:
        chunks: of the body, if they are watched on their way.
    """
    outcome = "refused"
    try:
        async with receive_upload(
            request.headers.get("content-type", ""),
            request.stream() if chunks is None else chunks,
            services.staging,
            text_fields=text_fields,
        ) as upload:
            services.metrics.upload_bytes.inc(sum(file.size for file in upload.files))
            answer = await anyio.to_thread.run_sync(
                store, services, upload, principal, idempotency_key, limiter=services.intake_limiter
            )
        outcome = "created" if answer.status == 201 else "known"
    except RankwiseError as error:
        outcome = error.code
        raise
    except ClientDisconnect:
        outcome = "disconnected"
        raise
    finally:
        services.metrics.uploads.labels(outcome).inc()
    return answer.response()
