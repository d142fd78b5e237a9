"""Every error as an RFC 9457 problem: the one error tree, pydantic's findings, and whatever the framework raises."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match
from starlette.types import Scope

from artifacts.errors import FieldError, RankwiseError
from artifacts.pointers import pointer_token

MEDIA_TYPE = "application/problem+json"
_MAX_ERRORS = 100
_RETRY_AFTER_SECONDS: Mapping[str, int] = {
    "queue_full": 10,
    "quota_exceeded": 60,
    "idempotency_in_flight": 1,
    "database_unavailable": 5,
    "blob_store_unavailable": 5,
    "not_ready": 5,
}


class MethodNotAllowed(RankwiseError):
    code, status, title = "method_not_allowed", 405, "Method not allowed"


class NotReady(RankwiseError):
    code, status, title = "not_ready", 503, "Not ready"


class Finding(BaseModel):
    """One thing that is wrong, and where."""

    pointer: str = Field(
        description="JSON pointer into the body, `/query/…`, `/path/…`, `/header/…`; or a file, or a key."
    )
    message: str


class Problem(BaseModel):
    """An error, as RFC 9457 has it. `code` is stable; `detail` is for people."""

    model_config = ConfigDict(json_schema_extra={"required": ["type", "title", "status", "detail", "code", "errors"]})

    type: str = Field(description="Where this code is explained, relative to the server.")
    title: str
    status: int
    detail: str
    code: str
    hint: str | None = Field(None, description="What to do about it.")
    errors: list[Finding] = Field(default_factory=list)
    request_id: str | None = Field(None, description="Quote it when you report the problem; the logs carry it too.")


class ProblemResponse(JSONResponse):
    media_type = MEDIA_TYPE

    def render(self, content: Any) -> bytes:
        # A client's file name may hold what UTF-8 can not; the answer must be sendable all the same.
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def problem(
    scope: Scope,
    *,
    status: int,
    code: str,
    title: str,
    detail: str,
    hint: str | None = None,
    errors: Sequence[FieldError] = (),
    headers: Mapping[str, str] | None = None,
    retry_after: int | None = None,
) -> ProblemResponse:
    """A problem answer to the request of `scope`; at most 100 findings are listed.

    `retry_after` is in seconds; codes that come and go have a value of their own, so that the header is never missing.
    """
    body: dict[str, Any] = {
        "type": f"/problems/{code}",
        "title": title,
        "status": status,
        "detail": detail,
        "code": code,
        "errors": [{"pointer": item.pointer, "message": item.message} for item in errors[:_MAX_ERRORS]],
        "request_id": scope.get("state", {}).get("request_id"),
    }
    if hint is not None:
        body["hint"] = hint
    all_headers = dict(headers or {})
    seconds = _RETRY_AFTER_SECONDS.get(code) if retry_after is None else max(1, retry_after)
    if seconds is not None:
        all_headers.setdefault("Retry-After", str(seconds))
    if status == 401:
        all_headers.setdefault("WWW-Authenticate", 'Bearer realm="rankwise"')
    return ProblemResponse(body, status_code=status, headers=all_headers)


def problem_of(scope: Scope, error: RankwiseError, headers: Mapping[str, str] | None = None) -> ProblemResponse:
    """The problem that `error` becomes."""
    return problem(
        scope,
        status=error.status,
        code=error.code,
        title=error.title,
        detail=error.detail,
        hint=error.hint,
        errors=error.errors,
        headers=headers,
        retry_after=error.retry_after,
    )


def unexpected_problem(scope: Scope) -> ProblemResponse:
    """What a client may know of a bug: that there is one, and the id under which the logs tell the rest."""
    return problem(
        scope,
        status=RankwiseError.status,
        code=RankwiseError.code,
        title=RankwiseError.title,
        detail="Something unexpected went wrong. The server's log has it under this request id.",
    )


def pointer_of(location: Sequence[int | str]) -> str:
    """The JSON pointer (RFC 6901) of a pydantic location; what is in the body starts at the body's root."""
    parts = location[1:] if location and location[0] == "body" else location
    return "".join("/" + pointer_token(str(part)) for part in parts)


def _findings(errors: Iterable[Any]) -> Iterator[FieldError]:
    for item in errors:
        yield FieldError(pointer_of(item.get("loc", ())), item.get("msg", "invalid").removeprefix("Value error, "))


def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    findings = list(_findings(error.errors()))
    first = findings[0] if findings else FieldError("", "invalid")
    return problem(
        request.scope,
        status=422,
        code="invalid_request",
        title="The request is not valid",
        detail=f"{first.pointer or 'body'}: {first.message}",
        errors=findings,
    )


def _rankwise(request: Request, error: Exception) -> Response:
    assert isinstance(error, RankwiseError)
    return problem_of(request.scope, error)


def allowed_methods(scope: Scope) -> list[str]:
    """Every method that some route takes at the path of `scope`."""
    found: set[str] = set()
    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"):
        probe = {**scope, "method": method}
        if any(route.matches(probe)[0] is Match.FULL for route in scope["app"].router.routes):
            found.add(method)
    return sorted(found)


def method_not_allowed(request: Request, allowed: str, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a method that a path does not take; `allowed` are those that it takes."""
    problem = MethodNotAllowed(f"{request.method} is not possible here.", hint=f"This path takes {allowed}.")
    return problem_of(request.scope, problem, {**(headers or {}), "Allow": allowed})


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    path = request.scope["path"]
    if error.status_code == 405:
        return method_not_allowed(request, ", ".join(allowed_methods(request.scope)), headers)
    code, title, detail = {
        404: ("not_found", "Not found", f"There is nothing at {path[:200]!r}; GET /docs lists all calls."),
        413: ("too_large", "Too large", str(error.detail)),
        400: ("malformed_request", "The request could not be parsed", str(error.detail)),
    }.get(error.status_code, ("http_error", "The request failed", str(error.detail)))
    return problem(request.scope, status=error.status_code, code=code, title=title, detail=detail, headers=headers)


def _gone(request: Request, error: Exception) -> Response:
    """The client has left: nobody reads this, but the access log shows the status that nginx made customary."""
    return Response(status_code=499)


def install(app: FastAPI) -> None:
    """Register the handlers. What none of them takes is a bug, and the request middleware answers for it."""
    app.add_exception_handler(RankwiseError, _rankwise)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _gone)


def error_classes() -> dict[str, type[RankwiseError]]:
    """Every code that a problem can carry, with its class."""

    def walk(cls: type[RankwiseError]) -> Iterator[type[RankwiseError]]:
        yield cls
        for child in cls.__subclasses__():
            yield from walk(child)

    return {cls.code: cls for cls in walk(RankwiseError)}


_DESCRIPTIONS: Mapping[int, str] = {
    400: "Not parseable as HTTP, JSON or multipart",
    401: "No valid API key",
    403: "The API key lacks the scope",
    404: "There is no such thing",
    409: "Not possible in the present state, or the first request with this key still runs",
    410: "It has ended, and takes nothing any more",
    412: "It has changed since the version that If-Match names",
    413: "The body is over the limit",
    415: "A media type that is not accepted here, or a pickle",
    416: "The range lies outside of the file",
    422: "Well-formed, but not valid",
    429: "The queue is full, or a limit of the API key is reached",
    500: "A bug, or stored bytes that are missing or corrupt",
    503: "The database or the blob store is not available",
    507: "The disk is full",
}


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries for `statuses` and for those that any call can give (400, 401, 403, 422, 500, 503)."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {"description": _DESCRIPTIONS[status], "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in sorted({400, 401, 403, 422, 500, 503, *statuses})
    }
