"""JSON bodies, read strictly: nothing comes in that JSON, UTF-8 or a database could not carry out again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from artifacts.errors import MalformedRequest, UnsupportedMedia
from artifacts.json_objects import unique_members

MAX_INTEGER = 2**63 - 1
MAX_DEPTH = 64


def parse_json(body: bytes) -> Any:
    """The document in `body`.

    Raises:
        MalformedRequest: not UTF-8 or not JSON; a key twice in one object; NaN, Infinity or a number beyond float
            or 64-bit integers; a NUL character or half of a surrogate pair in a string; deeper than `MAX_DEPTH`.
    """
    try:
        document = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=unique_members(_twice),
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
    except UnicodeDecodeError as error:
        raise MalformedRequest(f"The body is not UTF-8: {error.reason} at byte {error.start}.") from error
    except json.JSONDecodeError as error:
        raise MalformedRequest(
            f"The body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from error
    except RecursionError as error:
        raise MalformedRequest(f"The body is nested deeper than {MAX_DEPTH} levels.") from error
    _check(document, 0)
    return document


def _twice(name: str) -> MalformedRequest:
    return MalformedRequest(f"The body names {name[:80]!r} twice in one object.")


def _no_constant(text: str) -> Any:
    raise MalformedRequest(f"{text} is not a JSON number.")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise MalformedRequest(f"The number {text[:40]} is out of range.")
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or not -MAX_INTEGER - 1 <= (value := int(text)) <= MAX_INTEGER:
        raise MalformedRequest(f"The integer {text[:40]} does not fit 64 bits.")
    return value


def _check(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise MalformedRequest(f"The body is nested deeper than {MAX_DEPTH} levels.")
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_text(name)
            _check(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check(item, depth + 1)


def _check_text(value: str) -> None:
    if "\0" in value:
        raise MalformedRequest("The body has a NUL character in a string.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MalformedRequest("The body has half of a surrogate pair in a string.") from error


class ParsedRequest(Request):
    """A request whose body has been read, and parsed when there is one."""

    def __init__(self, request: Request, body: bytes, document: Any) -> None:
        async def replay() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        super().__init__(request.scope, replay, request._send)
        self._body = body
        self._document = document

    async def json(self) -> Any:
        return self._document


class JsonRoute(APIRoute):
    """A route that takes JSON and nothing else: 415 for another content type, 400 for what `parse_json` refuses."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler

        async def read_json(request: Request) -> Response:
            body = await request.body()
            if not body:
                return await handler(request)
            media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if media_type != "application/json":
                raise UnsupportedMedia(f"The body has content type {media_type[:80]!r}.", hint="Send application/json.")
            return await handler(ParsedRequest(request, body, parse_json(body)))

        return read_json
