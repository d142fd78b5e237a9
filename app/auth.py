"""API keys: who calls, and what the key allows. Off by default, when only this machine can call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from app.settings import is_loopback
from app.state import Services
from artifacts.errors import RankwiseError, ScopeMissing, Unauthenticated
from storage import keys

Scope = Literal["read", "write", "jobs", "client", "admin"]
_HINT = "Send `Authorization: Bearer rw_…` or `X-API-Key: rw_…`; keys are made with `rankwise keys create`."


class ForeignOrigin(RankwiseError):
    code, status, title = "foreign_origin", 403, "Not from this machine"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who makes the request. `key_id` is None when the server runs without keys."""

    key_id: str | None
    scopes: frozenset[str]

    @property
    def owner(self) -> str:
        """The name under which idempotency keys are kept apart."""
        return self.key_id or "anonymous"


ANONYMOUS = Principal(None, frozenset(keys.SCOPES))


def refuse_foreign_pages(request: Request) -> None:
    """Without keys, loopback is the only guard, and a browser on this machine lets any web page knock on it.

    A page of another site shows its Origin when it posts; one that has its own name point here (DNS rebinding) shows
    that name in Host.

    Raises:
        ForeignOrigin: either of them is not a name of this machine's loopback.
    """
    host = _host_name(f"//{request.headers.get('host', '')}")
    origin = request.headers.get("origin")
    page = host if origin is None else _host_name(origin)
    for name in (host, page):
        if not is_loopback(name) and not name.endswith(".localhost"):
            raise ForeignOrigin(
                f"Without API keys only this machine may call, under a name of its own; this came for {name[:100]!r}.",
                hint="Call http://127.0.0.1 or http://localhost, or set RANKWISE_API_KEYS=on.",
            )


def _host_name(url: str) -> str:
    """The host in a URL; empty when there is none or it can not be read."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def presented_secret(request: Request) -> str:
    """The key in the headers. Raises Unauthenticated when there is none."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    if secret := request.headers.get("x-api-key", "").strip():
        return secret
    raise Unauthenticated("This server asks for an API key.", hint=_HINT)


def require(scope: Scope) -> Callable[[Request], Awaitable[Principal]]:
    """A dependency that lets only keys with `scope` (or with `admin`) pass and returns who they are."""

    async def principal(request: Request) -> Principal:
        services: Services = request.app.state.services
        if not services.settings.api_keys:
            refuse_foreign_pages(request)
            return ANONYMOUS
        secret = presented_secret(request)
        found = await run_in_threadpool(_authenticate, services, secret)
        if scope not in found.scopes and "admin" not in found.scopes:
            raise ScopeMissing(
                f"This call needs the scope {scope!r}; the key has {', '.join(sorted(found.scopes)) or 'none'}."
            )
        return found

    return principal


def _authenticate(services: Services, secret: str) -> Principal:
    with services.database.read() as session:
        row = keys.authenticate(session, secret)
    if services.key_uses.is_due(row.id):
        with services.database.write() as session:
            keys.touch_key(session, row.id)
    return Principal(row.id, frozenset(row.scopes))
