"""Adapters: upload, list, show, delete, download, lineage."""

from __future__ import annotations

from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse

from app.adapter_intake import TEXT_FIELDS, store_upload
from app.byte_ranges import ByteRange, etag_matches, parse_range, range_applies
from app.dependencies import AdapterId, IdempotencyKey, Reader, ServicesDep, Writer
from app.downloads import Download, peft_download, safetensors_download
from app.json_body import JsonRoute
from app.problems import problem_of, problem_responses
from app.schemas.adapters import (
    UPLOAD_FORM_SCHEMA,
    Adapter,
    AdapterLineage,
    AdapterQuery,
    AdapterSummary,
    DownloadFormat,
)
from app.schemas.common import PageOf
from app.segments import read_segments
from app.state import Services
from app.uploads import receive_upload
from artifacts.errors import RangeInvalid, RankwiseError
from storage import adapters
from storage.adapters import AdapterFilter

router = APIRouter(tags=["adapters"], route_class=JsonRoute)

_LOCATION = {"Location": {"description": "Path of the adapter.", "schema": {"type": "string"}}}


@router.post(
    "/adapters",
    status_code=201,
    summary="Upload an adapter",
    response_model=Adapter,
    responses={
        201: {"description": "A new adapter", "headers": _LOCATION},
        200: {"description": "The same content is here already", "model": Adapter, "headers": _LOCATION},
        **problem_responses(409, 413, 415, 429, 507),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": UPLOAD_FORM_SCHEMA,
                    "encoding": {"file": {"contentType": "application/octet-stream"}},
                }
            },
        }
    },
)
async def upload_adapter(
    request: Request, services: ServicesDep, principal: Writer, idempotency_key: IdempotencyKey = None
) -> JSONResponse:
    """One .safetensors, .zip, .tar or .tar.gz, or the files of a PEFT directory as one part each.

    The body is streamed to disk and hashed on the way; the same content again gives the adapter that is there.
    """
    outcome = "refused"
    try:
        async with receive_upload(
            request.headers.get("content-type", ""), request.stream(), services.staging, text_fields=TEXT_FIELDS
        ) as upload:
            services.metrics.upload_bytes.inc(sum(file.size for file in upload.files))
            answer = await anyio.to_thread.run_sync(
                store_upload, services, upload, principal, idempotency_key, limiter=services.intake_limiter
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


@router.get("/adapters", summary="List adapters", responses=problem_responses())
def list_adapters(
    services: ServicesDep, principal: Reader, query: Annotated[AdapterQuery, Query()]
) -> PageOf[AdapterSummary]:
    """Newest first. `next` is the cursor of the next page, with the same filters."""
    filters = AdapterFilter(
        base_model=query.base_model, method=query.method, tag=query.tag, name=query.name, sha256=query.sha256
    )
    with services.database.read() as session:
        page = adapters.list_adapters(session, filters, cursor=query.cursor, limit=query.limit)
        return PageOf[AdapterSummary](items=[AdapterSummary.of(row) for row in page.items], next=page.next)


@router.get("/adapters/{adapter_id}", summary="Show an adapter", responses=problem_responses(404))
def get_adapter(services: ServicesDep, principal: Reader, adapter_id: AdapterId) -> Adapter:
    """Its configuration, files, modules, and the report on every key of the upload."""
    with services.database.read() as session:
        return Adapter.of(adapters.get_adapter(session, adapter_id))


@router.delete(
    "/adapters/{adapter_id}", status_code=204, summary="Delete an adapter", responses=problem_responses(404, 507)
)
def delete_adapter(services: ServicesDep, principal: Writer, adapter_id: AdapterId) -> Response:
    """The adapter disappears from lists and downloads; the lineage of what was made from it stays whole."""
    with services.database.write() as session:
        adapters.delete_adapter(session, adapter_id)
    return Response(status_code=204)


@router.get("/adapters/{adapter_id}/lineage", summary="Show where it came from", responses=problem_responses(404))
def get_lineage(services: ServicesDep, principal: Reader, adapter_id: AdapterId) -> AdapterLineage:
    """Ancestors and descendants, deleted ones included, with the recipe of each step."""
    with services.database.read() as session:
        return AdapterLineage.of(adapter_id, adapters.lineage(session, adapter_id))


_BINARY: dict[str, Any] = {
    "application/zip": {"schema": {"type": "string", "format": "binary"}},
    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
}
_DOWNLOAD_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The whole file",
        "content": _BINARY,
        "headers": {"ETag": {"schema": {"type": "string"}}, "Accept-Ranges": {"schema": {"type": "string"}}},
    },
    206: {
        "description": "The range that was asked for",
        "content": _BINARY,
        "headers": {"Content-Range": {"schema": {"type": "string"}}},
    },
    304: {"description": "The client has it already"},
    **problem_responses(404, 416),
}
Format = Annotated[
    DownloadFormat, Query(alias="format", description="peft: a zip of a PEFT directory; safetensors: one file.")
]


@router.get(
    "/adapters/{adapter_id}/download",
    summary="Download an adapter",
    response_class=StreamingResponse,
    responses=_DOWNLOAD_RESPONSES,
)
def download_adapter(
    request: Request, services: ServicesDep, principal: Reader, adapter_id: AdapterId, layout: Format = "peft"
) -> Response:
    """Takes Range, If-Range and If-None-Match. The same adapter always gives the same bytes."""
    return _download(request, services, adapter_id, layout)


@router.head(
    "/adapters/{adapter_id}/download",
    summary="Ask for the size and ETag of a download",
    response_class=Response,
    responses={
        status: {name: value for name, value in entry.items() if name != "content"}
        for status, entry in _DOWNLOAD_RESPONSES.items()
        if status != 206
    },
)
def head_download(
    request: Request, services: ServicesDep, principal: Reader, adapter_id: AdapterId, layout: Format = "peft"
) -> Response:
    """The headers of the download."""
    return _download(request, services, adapter_id, layout)


def _download(request: Request, services: Services, adapter_id: str, layout: DownloadFormat) -> Response:
    with services.database.read() as session:
        row = adapters.get_adapter(session, adapter_id)
    found = (
        peft_download(services.blobs, services.crc32, row)
        if layout == "peft"
        else safetensors_download(services.blobs, row)
    )
    headers = {
        "ETag": found.etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "Content-Disposition": f'attachment; filename="{found.file_name}"',
    }
    if etag_matches(request.headers.get("if-none-match"), found.etag):
        return Response(status_code=304, headers=headers)
    part = None
    if request.method == "GET" and range_applies(request.headers.get("if-range"), found.etag):
        try:
            part = parse_range(request.headers.get("range"), found.size)
        except RangeInvalid as error:
            return problem_of(request.scope, error, {"Content-Range": f"bytes */{found.size}"})
    return _send(services, found, part, headers, body=request.method == "GET")


def _send(
    services: Services, found: Download, part: ByteRange | None, headers: dict[str, str], *, body: bool
) -> Response:
    start, stop = (part.start, part.stop) if part else (0, found.size)
    headers["Content-Length"] = str(stop - start)
    if part:
        headers["Content-Range"] = part.content_range
    status = 206 if part else 200
    if not body:
        return Response(status_code=status, headers=headers, media_type=found.media_type)
    chunks = read_segments(services.blobs, found.segments, start, stop)
    return StreamingResponse(chunks, status, headers, media_type=found.media_type)
