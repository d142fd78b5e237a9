"""A file as the answer to a request: whole or a range of it, or the news that the client has it already."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from app.byte_ranges import ByteRange, etag_matches, parse_range, range_applies
from app.problems import problem_of, problem_responses
from app.state import Services
from artifacts.errors import RangeInvalid
from storage.downloads import Download
from storage.segments import read_segments

Responses = dict[int | str, dict[str, Any]]
Endpoint = TypeVar("Endpoint", bound=Callable[..., Response])


def file_responses(media_types: Iterable[str]) -> Responses:
    """The OpenAPI entries of a download of these media types."""
    binary = {name: {"schema": {"type": "string", "format": "binary"}} for name in media_types}
    return {
        200: {
            "description": "The whole file",
            "content": binary,
            "headers": {"ETag": {"schema": {"type": "string"}}, "Accept-Ranges": {"schema": {"type": "string"}}},
        },
        206: {
            "description": "The range that was asked for",
            "content": binary,
            "headers": {"Content-Range": {"schema": {"type": "string"}}},
        },
        304: {"description": "The client has it already"},
        **problem_responses(404, 416),
    }


def file_route(
    router: APIRouter, path: str, *, summary: str, head_summary: str, responses: Responses
) -> Callable[[Endpoint], Endpoint]:
    """Declare the function below as the GET of a file and as its HEAD, which is called head_… in the document; what it
    answers comes from `answer_file`.

    Args:
        responses: the OpenAPI entries of GET, from `file_responses`.
    """

    def declare(endpoint: Endpoint) -> Endpoint:
        router.get(path, summary=summary, response_class=StreamingResponse, responses=responses)(endpoint)
        router.head(
            path,
            name=f"head_{endpoint.__name__.partition('_')[2]}",
            summary=head_summary,
            description="The headers of the download.",
            response_class=Response,
            responses=_head_responses(responses),
        )(endpoint)
        return endpoint

    return declare


def _head_responses(responses: Responses) -> Responses:
    """The same for HEAD, whose answers have no body and know no ranges."""
    return {
        status: {name: value for name, value in entry.items() if name != "content"}
        for status, entry in responses.items()
        if status != 206
    }


def answer_file(request: Request, services: Services, found: Download) -> Response:
    """The answer by Range (of a GET), If-Range and If-None-Match; of HEAD without the bytes."""
    headers = {
        "ETag": found.etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "Content-Disposition": f'attachment; filename="{found.file_name}"',
        **found.headers,
    }
    if etag_matches(request.headers.get("if-none-match"), found.etag):
        return Response(status_code=304, headers=headers)
    part = None
    if request.method == "GET" and range_applies(request.headers.get("if-range"), found.etag):
        try:
            part = parse_range(request.headers.get("range"), found.size)
        except RangeInvalid as error:
            return problem_of(request.scope, error, {"Content-Range": f"bytes */{found.size}"})
    return _send(services, found, part, headers, body=request.method != "HEAD")


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
