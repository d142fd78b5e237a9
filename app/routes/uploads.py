"""Uploads in pieces, which go on where they were interrupted: draft-ietf-httpbis-resumable-upload-12."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Header, Path, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from app.dependencies import HEX_ID, IdempotencyKey, ServicesDep, Writer
from app.idempotency import Answer, answer_once, request_key
from app.json_body import JsonRoute
from app.problems import problem_of, problem_responses
from app.schemas.adapters import Adapter
from app.schemas.common import PageOf, as_json
from app.schemas.uploads import Upload, UploadQuery, UploadRequest
from app.state import Services
from app.upload_end import cancel, complete
from app.upload_segments import append, find_upload, lifetime_of
from artifacts.errors import FieldError, TooLarge, UnsupportedMedia, UploadOffsetMismatch
from storage import uploads
from storage.tables import UploadRow

router = APIRouter(tags=["uploads"], route_class=JsonRoute)

MEDIA_TYPES = ("application/partial-upload", "application/octet-stream")
"""The draft's, and that of clients which know no other."""
UploadId = Annotated[str, Path(pattern=f"^upl_{HEX_ID}$", description="Id of the upload.")]
_INTEGER = {"schema": {"type": "integer"}}
_TEXT = {"schema": {"type": "string"}}
_STATE: dict[str, Any] = {
    "Upload-Offset": {"description": "Bytes that are stored.", **_INTEGER},
    "Upload-Complete": {"description": "?1 when it takes no more bytes.", **_TEXT},
    "Upload-Length": {"description": "Bytes of the whole file.", **_INTEGER},
    "Upload-Limit": {"description": "max-size in bytes, max-age in seconds from now.", **_TEXT},
}
_LOCATION = {"Location": {"description": "Path of the upload.", **_TEXT}}
_ADAPTER = {"Location": {"description": "Path of the adapter.", **_TEXT}}


@router.post(
    "/uploads",
    status_code=201,
    summary="Begin an upload in pieces",
    response_model=Upload,
    responses={201: {"headers": {**_LOCATION, **_STATE}}, **problem_responses(409, 413, 415, 429, 507)},
)
def create_upload(
    services: ServicesDep, principal: Writer, body: UploadRequest, idempotency_key: IdempotencyKey = None
) -> JSONResponse:
    """Announce one file: an archive of a PEFT directory, or a file that `POST /adapters` takes alone.

    Then send its bytes with `PATCH`, as many at a time as you like; `HEAD` tells where to go on after an interruption.
    The bytes count as stored by the key from now on.
    """
    limit = services.settings.max_upload_bytes
    if body.length > limit:
        raise TooLarge(
            f"{body.length} bytes are over the limit of {limit} of this service.",
            errors=[FieldError("/length", f"must be at most {limit}")],
        )

    def act(session: Any) -> Answer:
        row = uploads.create_upload(
            session,
            created_by=principal.key_id,
            file_name=body.file_name,
            form=as_json(body.form()),
            length=body.length,
            sha256=body.sha256,
            lifetime=lifetime_of(services),
        )
        return Answer(201, as_json(Upload.of(row)), {"Location": f"/uploads/{row.id}", **_headers(services, row)})

    key = request_key(principal.owner, idempotency_key, "POST /uploads", as_json(body))
    return answer_once(services, key, act).response()


@router.get("/uploads", summary="List uploads in pieces", responses=problem_responses())
def list_uploads(services: ServicesDep, principal: Writer, query: Annotated[UploadQuery, Query()]) -> PageOf[Upload]:
    """Those of the calling key, newest first; one that its client has forgotten is found by the file's digest."""
    with services.database.read() as session:
        page = uploads.list_uploads(
            session,
            owner=principal.key_id,
            sha256=query.sha256,
            state=query.state,
            cursor=query.cursor,
            limit=query.limit,
        )
        return PageOf[Upload](items=[Upload.of(row) for row in page.items], next=page.next)


@router.get(
    "/uploads/{upload_id}",
    summary="Show an upload in pieces",
    response_model=Upload,
    responses={200: {"headers": _STATE}, **problem_responses(404)},
)
def get_upload(services: ServicesDep, principal: Writer, upload_id: UploadId) -> JSONResponse:
    """How far it is, what it has become, or why it has failed. Another key's uploads are not shown."""
    row = find_upload(services, principal, upload_id)
    return JSONResponse(as_json(Upload.of(row)), headers=_headers(services, row))


@router.head(
    "/uploads/{upload_id}",
    status_code=204,
    summary="Ask where an upload goes on",
    response_class=Response,
    responses={204: {"headers": _STATE}, **problem_responses(404)},
)
def head_upload(services: ServicesDep, principal: Writer, upload_id: UploadId) -> Response:
    """Upload-Offset is the number of bytes that are stored: send the others."""
    return Response(status_code=204, headers=_headers(services, find_upload(services, principal, upload_id)))


@router.patch(
    "/uploads/{upload_id}",
    status_code=204,
    summary="Append to an upload",
    response_class=Response,
    responses={
        204: {"description": "The bytes are stored", "headers": _STATE},
        200: {"description": "Completed: an adapter that was there already", "model": Adapter, "headers": _ADAPTER},
        201: {"description": "Completed: a new adapter", "model": Adapter, "headers": _ADAPTER},
        **problem_responses(404, 409, 413, 415, 429, 507),
    },
    openapi_extra={
        "requestBody": {
            "content": {media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in MEDIA_TYPES}
        },
    },
)
async def append_upload(
    request: Request,
    services: ServicesDep,
    principal: Writer,
    upload_id: UploadId,
    offset: Annotated[
        int, Header(alias="Upload-Offset", ge=0, le=2**53, description="Number of the first byte of this body.")
    ],
    completing: Annotated[
        str, Header(alias="Upload-Complete", pattern=r"^\?[01]$", description="?1: the file ends with this body.")
    ] = "?0",
) -> Response:
    """Add bytes, from the next one on. What has come is kept, also when the connection breaks.

    With `Upload-Complete: ?1`, also with an empty body, the file is compared with its digest and becomes an adapter;
    the answer is that of `POST /adapters`. A fault of the file itself (415, 422) ends the upload; after any other error
    this can be asked again.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in MEDIA_TYPES:
        raise UnsupportedMedia(f"The body has content type {media_type[:80]!r}.", hint=f"Send {MEDIA_TYPES[0]}.")
    try:
        row = await run_in_threadpool(find_upload, services, principal, upload_id)
        if row.state != "done" or completing == "?0":
            row = await append(services, principal, upload_id, offset, request.stream())
    except UploadOffsetMismatch as error:
        return problem_of(request.scope, error, {"Upload-Offset": str(error.expected)})
    if completing == "?0":
        return Response(status_code=204, headers=_headers(services, row))
    answer = await anyio.to_thread.run_sync(complete, services, principal, upload_id, limiter=services.intake_limiter)
    return answer.response()


@router.delete(
    "/uploads/{upload_id}", status_code=204, summary="Cancel an upload", responses=problem_responses(404, 507)
)
def delete_upload(services: ServicesDep, principal: Writer, upload_id: UploadId) -> Response:
    """Its bytes go, and count as stored no longer. An adapter that it has become stays."""
    cancel(services, principal, upload_id)
    return Response(status_code=204)


def _headers(services: Services, row: UploadRow) -> dict[str, str]:
    left = max(0, int((row.expires_at - datetime.now(UTC)).total_seconds()))
    return {
        "Upload-Offset": str(row.received),
        "Upload-Complete": "?0" if row.state == "open" else "?1",
        "Upload-Length": str(row.length),
        "Upload-Limit": f"max-size={services.settings.max_upload_bytes}, max-age={left}",
        "Cache-Control": "no-store",
    }
