"""Pure ASGI middleware: request ids, access log, metrics, the last resort for bugs, and the cap on bodies."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.metrics import Metrics
from app.problems import problem, unexpected_problem

REQUEST_ID_HEADER = "X-Request-ID"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_QUIET_ROUTES = frozenset({"/healthz", "/readyz", "/metrics"})
_log = structlog.stdlib.get_logger("app.access")


def _request_id(headers: Headers) -> str:
    """The client's own id when it is harmless in a log and a header, else a new one."""
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _route_of(scope: Scope) -> str:
    """The route's template, so that ids do not become labels."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else "unmatched"


class RequestMiddleware:
    """Outermost: gives each request an id, logs and counts it, and answers for bugs."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = request_id
        watch = _Watch(send, request_id)
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            self.metrics.requests_open.inc()
            try:
                await self.app(scope, receive, watch.send)
            except Exception:
                _log.exception("unexpected_error", method=scope["method"], route=_route_of(scope))
                if watch.status is not None:
                    raise  # half an answer is out: only breaking the connection tells the client
                await unexpected_problem(scope)(scope, receive, watch.send)
            finally:
                self.metrics.requests_open.dec()
                self._record(scope, watch)

    def _record(self, scope: Scope, watch: _Watch) -> None:
        seconds = time.perf_counter() - watch.started
        route, method = _route_of(scope), scope["method"]
        if not re.fullmatch(r"[A-Z]{1,10}", method):
            method = "other"
        status = str(watch.status or 0)
        self.metrics.requests.labels(method, route, status).inc()
        self.metrics.request_seconds.labels(method, route).observe(seconds)
        log = _log.debug if route in _QUIET_ROUTES and watch.status == 200 else _log.info
        client = scope.get("client")
        log(
            "request",
            method=method,
            path=scope["path"][:300],
            route=route,
            status=watch.status,
            milliseconds=round(seconds * 1000, 1),
            bytes_out=watch.bytes_out,
            client=client[0] if client else None,
        )


class _Watch:
    """Sees the answer pass by: its status and size; adds the request id to its headers."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.started = time.perf_counter()
        self.status: int | None = None
        self.bytes_out = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)[REQUEST_ID_HEADER] = self._request_id
        elif message["type"] == "http.response.body":
            self.bytes_out += len(message.get("body", b""))
        await self._send(message)


class BodyTooLarge(HTTPException):
    """Raised from `receive`; an HTTPException because FastAPI lets only those through while it reads a body."""

    def __init__(self, limit: int) -> None:
        super().__init__(413, f"The body is over the limit of {limit} bytes.")


class BodyLimitMiddleware:
    """Refuses a body over the limit by its Content-Length, or as soon as it has grown too long.

    Args:
        limit: bytes, for every route that `routes` does not name.
        routes: (method, pattern of the path) → bytes.
    """

    def __init__(self, app: ASGIApp, limit: int, routes: Mapping[tuple[str, re.Pattern[str]], int]) -> None:
        self.app = app
        self.limit = limit
        self.routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
        limit = self._limit_of(scope["method"], path)
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > limit:
            await self._refuse(scope, receive, send, limit)
            return
        await self.app(scope, _Counter(receive, limit).receive, send)

    def _limit_of(self, method: str, path: str) -> int:
        for (named, pattern), limit in self.routes.items():
            if named == method and pattern.fullmatch(path):
                return limit
        return self.limit

    @staticmethod
    async def _refuse(scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        response: Any = problem(
            scope,
            status=413,
            code="too_large",
            title="Too large",
            detail=f"The body is over the limit of {limit} bytes.",
        )
        await response(scope, receive, send)


class _Counter:
    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._left = limit
        self._limit = limit

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                raise BodyTooLarge(self._limit)
        return message
