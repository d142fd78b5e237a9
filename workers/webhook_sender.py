"""One try to send one message of a webhook: signed, bounded in time, and only to where the policy allows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import httpx
import structlog
from standardwebhooks import Webhook

from artifacts.errors import RequestInvalid
from storage.deliveries import Dispatch
from storage.text import dump_json
from workers.egress import EgressPolicy, Resolver
from workers.pinned_transport import PinnedTransport, resolve, tls_context

MAX_ANSWER_BYTES = 4096
USER_AGENT = "Rankwise-Webhooks/1"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Reply:
    """How a try went. `status` is the receiver's, if it came to one; `error` is None for success."""

    status: int | None
    error: str | None = None
    retry_after: float = 0.0

    @property
    def delivered(self) -> bool:
        return self.error is None

    @property
    def gone(self) -> bool:
        """Whether the receiver wants no more messages."""
        return self.status == httpx.codes.GONE


class Sender:
    """An asynchronous context manager.

    Args:
        timeout_seconds: for one try as a whole.
        resolver: how names become addresses; this machine's own way unless given.
    """

    def __init__(self, policy: EgressPolicy, timeout_seconds: float, resolver: Resolver | None = None) -> None:
        self._timeout_seconds = timeout_seconds
        transport = PinnedTransport(policy, tls_context(), resolver or resolve)
        # A name's second address gets its chance within the time of the whole.
        timeout = httpx.Timeout(timeout_seconds, connect=timeout_seconds / 3)
        self._client = httpx.AsyncClient(transport=transport, trust_env=False, timeout=timeout)

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, trace)

    async def send(self, sent: Dispatch) -> Reply:
        """One try. Never raises, since one message must not stop the others."""
        began = time.monotonic()
        try:
            reply = await self._post(sent)
        except (TimeoutError, httpx.TimeoutException):
            reply = Reply(None, f"no answer within {self._timeout_seconds:g} s")
        except RequestInvalid as error:
            reply = Reply(None, f"refused: {error.detail}")
        except (httpx.HTTPError, OSError) as error:
            reply = Reply(None, f"no connection: {error}" if str(error) else f"no connection: {type(error).__name__}")
        except Exception as error:
            log.exception("webhook_not_sendable", webhook_id=sent.webhook_id, delivery_id=sent.id)
            reply = Reply(None, f"could not be sent: {type(error).__name__}")
        log.info(
            "webhook_sent" if reply.delivered else "webhook_failed",
            webhook_id=sent.webhook_id,
            delivery_id=sent.id,
            webhook_event=sent.event,
            attempt=sent.attempt,
            status=reply.status,
            error=reply.error,
            seconds=round(time.monotonic() - began, 3),
        )
        return reply

    async def _post(self, sent: Dispatch) -> Reply:
        body = dump_json(sent.payload)
        status: int | None = None
        try:
            async with (
                asyncio.timeout(self._timeout_seconds),
                self._client.stream(
                    "POST", sent.url, content=body.encode(), headers=signed_headers(sent, body)
                ) as response,
            ):
                status, reply = response.status_code, reply_of(response)
                await _drain(response)
                return reply
        except (TimeoutError, httpx.TransportError):
            if status is None:
                raise
            return reply  # the answer was given; only what followed it was lost


def signed_headers(sent: Dispatch, body: str) -> dict[str, str]:
    """The headers of a message, signed as Standard Webhooks has it; the time is that of this try."""
    return {
        "content-type": "application/json",
        "accept-encoding": "identity",
        "user-agent": USER_AGENT,
        "webhook-id": sent.id,
        "webhook-timestamp": str(int(sent.moment.timestamp())),
        "webhook-signature": Webhook(sent.secret).sign(sent.id, sent.moment, body),
    }


def reply_of(response: httpx.Response) -> Reply:
    """2xx is success. Only the status of an answer is kept: a URL must not become a way to read other servers."""
    status = response.status_code
    if response.is_success:
        return Reply(status)
    error = f"the receiver answered {status}"
    if response.is_redirect:
        error += "; redirects are not followed"
    return Reply(status, error, _retry_after(status, response.headers))


def _retry_after(status: int, headers: Mapping[str, str]) -> float:
    text = headers.get("retry-after", "").strip()
    if status not in (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE) or not text.isdecimal():
        return 0.0
    return float(text[:9])


async def _drain(response: httpx.Response) -> None:
    """Read the start of the answer, so that a polite receiver is not cut off in the middle of it."""
    seen = 0
    async for chunk in response.aiter_raw():
        seen += len(chunk)
        if seen >= MAX_ANSWER_BYTES:
            return
