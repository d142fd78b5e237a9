"""Idempotency-Key: the first answer to a key is kept, and given again to whoever repeats the request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog
from sqlalchemy.orm import Session
from starlette.responses import JSONResponse

from app.state import Services
from artifacts.errors import RankwiseError
from storage import idempotency

T = TypeVar("T")
_log = structlog.stdlib.get_logger(__name__)

REPLAYED_HEADER = "Idempotency-Replayed"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that can be kept: status, JSON body and headers. `replayed` marks the copies."""

    status: int
    body: Any
    headers: Mapping[str, str] = field(default_factory=dict)
    replayed: bool = False

    def response(self, **headers: str) -> JSONResponse:
        marks = {REPLAYED_HEADER: "true"} if self.replayed else {}
        return JSONResponse(self.body, self.status, {**self.headers, **headers, **marks})


@dataclass(frozen=True, slots=True)
class RequestKey:
    """An idempotency key, whose it is, and the digest of the request that it stands for. `key` may be None."""

    owner: str
    key: str | None
    digest: str


def request_key(owner: str, key: str | None, operation: str, payload: Any) -> RequestKey:
    """The key of a request. `operation` is method and path; `payload` anything that is JSON."""
    canonical = json.dumps([operation, payload], sort_keys=True, separators=(",", ":"), default=str)
    return RequestKey(owner, key, hashlib.sha256(canonical.encode()).hexdigest())


def _stored(session: Session, key: RequestKey) -> Answer | None:
    if key.key is None:
        return None
    stored = idempotency.begin(session, key.owner, key.key, key.digest)
    if stored is None:
        return None
    return Answer(stored.status, json.loads(stored.body), dict(stored.headers), replayed=True)


def keep(session: Session, key: RequestKey, answer: Answer) -> None:
    """Keep `answer` under its key, in the caller's transaction."""
    if key.key is not None:
        body = json.dumps(answer.body, ensure_ascii=False, separators=(",", ":"))
        idempotency.complete(session, key.owner, key.key, answer.status, dict(answer.headers), body)


def answer_once(services: Services, key: RequestKey, act: Callable[[Session], Answer]) -> Answer:
    """Run `act` in one transaction together with its key: both happen or neither does.

    Raises:
        IdempotencyKeyReused, IdempotencyInFlight: see storage.idempotency; and whatever `act` raises.
    """
    with services.database.write() as session:
        stored = _stored(session, key)
        if stored is not None:
            return stored
        answer = act(session)
        keep(session, key, answer)
        return answer


def answer_after(
    services: Services, key: RequestKey, prepare: Callable[[], T], act: Callable[[Session, T], Answer]
) -> Answer:
    """As `answer_once`, for work that is too long for one transaction.

    The key is marked as in flight, `prepare` does the long work, then `act` and the key are one transaction. When
    either fails, the key is free again.
    """
    if key.key is not None:
        with services.database.write() as session:
            stored = _stored(session, key)
        if stored is not None:
            return stored
    try:
        prepared = prepare()
        with services.database.write() as session:
            answer = act(session, prepared)
            keep(session, key, answer)
            return answer
    except BaseException:
        _release(services, key)
        raise


def _release(services: Services, key: RequestKey) -> None:
    if key.key is None:
        return
    try:
        with services.database.write() as session:
            idempotency.abandon(session, key.owner, key.key)
    except RankwiseError as error:
        # The first error is the one to tell; storage gives the key up by itself after a while.
        _log.warning("idempotency_key_not_released", code=error.code, detail=error.detail)
