"""Sends the messages of the webhooks: signed, to allowed addresses only, and again when it did not work.

Any number of servers may run one each. A webhook has one lane in each: its messages go one after another, and an
endpoint that is slow or dead holds up nobody else's.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from artifacts.errors import RankwiseError
from storage import deliveries
from storage.database import Database
from storage.deliveries import Dispatch
from workers.egress import EgressPolicy, Resolver

if TYPE_CHECKING:
    from workers.webhook_sender import Reply, Sender

TIMEOUT_SECONDS = 10.0
"""For one try as a whole: name, connection, TLS, request and answer."""

LEASE_MARGIN_SECONDS = 20.0
LANES = 16
POLL_SECONDS = 0.5
MESSAGES_PER_TURN = 50
MAX_TURNS_KNOWN = 10_000


class Courier:
    """Sends what is due.

    Args:
        policy: where messages may go.
        timeout_seconds: for one try as a whole.
        resolver: how names become addresses; this machine's own way unless given.
    """

    def __init__(
        self,
        database: Database,
        policy: EgressPolicy,
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        lanes: int = LANES,
        resolver: Resolver | None = None,
    ) -> None:
        self._database = database
        self._policy = policy
        self._timeout_seconds = timeout_seconds
        self._lanes = lanes
        self._resolver = resolver
        self._turns: dict[str, int] = {}  # webhook → when it last had a turn here
        self._turn = 0
        self._guard = threading.Lock()
        self._closed = False
        self._round: tuple[asyncio.AbstractEventLoop, asyncio.Task[None]] | None = None

    def run(self) -> None:
        """Send until nothing is due and nothing on its way, or until `close`.

        Raises:
            DatabaseUnavailable, DiskFull: what could not be written as sent is sent again later.
        """
        if not self._due(1):
            return
        with suppress(asyncio.CancelledError):  # by `close`, and by nothing else
            asyncio.run(self._run_round())

    def close(self) -> None:
        """Stop, for good: what is on its way is given up, and sent again by the next server when its lease is over."""
        with self._guard:
            self._closed = True
            if self._round is not None:
                loop, task = self._round
                loop.call_soon_threadsafe(task.cancel)

    async def _run_round(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        with self._guard:
            if self._closed:
                return
            self._round = (asyncio.get_running_loop(), task)
        try:
            # Here and not at the top: a server that has no webhooks does without an HTTP client.
            from workers.webhook_sender import Sender

            async with Sender(self._policy, self._timeout_seconds, self._resolver) as sender:
                await self._serve_lanes(sender)
        finally:
            with self._guard:
                self._round = None

    async def _serve_lanes(self, sender: Sender) -> None:
        """Give each webhook with something due a lane, those first whose last turn is longest ago."""
        lanes: dict[asyncio.Task[None], str] = {}
        failure: BaseException | None = None
        try:
            while True:
                if failure is None:
                    try:
                        chosen = await self._next_webhooks(set(lanes.values()), self._lanes - len(lanes))
                    except RankwiseError as error:
                        failure, chosen = error, []
                    for webhook_id in chosen:
                        lanes[asyncio.create_task(self._serve(sender, webhook_id))] = webhook_id
                if not lanes:
                    break
                done, _ = await asyncio.wait(lanes, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del lanes[task]
                    # When the database goes away, what is on its way still gets its answer.
                    failure = failure or task.exception()
        finally:
            for task in lanes:
                task.cancel()
            await asyncio.gather(*lanes, return_exceptions=True)
        if failure is not None:
            raise failure

    async def _next_webhooks(self, busy: set[str], count: int) -> list[str]:
        due = [item for item in await asyncio.to_thread(self._due) if item not in busy]
        due.sort(key=lambda item: self._turns.get(item, 0))  # stable: then the one that waits longest
        if len(self._turns) > MAX_TURNS_KNOWN:
            self._turns.clear()
        for webhook_id in due[:count]:
            self._turn += 1
            self._turns[webhook_id] = self._turn
        return due[:count]

    async def _serve(self, sender: Sender, webhook_id: str) -> None:
        """One turn of a webhook: its messages one after another, until one fails or others should have a turn."""
        sent = await asyncio.to_thread(self._claim, webhook_id)
        for number in range(1, MESSAGES_PER_TURN + 1):
            if sent is None:
                return
            reply = await sender.send(sent)
            go_on = reply.delivered and number < MESSAGES_PER_TURN
            sent = await asyncio.to_thread(self._record, sent, reply, go_on)

    def _due(self, limit: int = 1000) -> list[str]:
        with self._database.read() as session:
            return deliveries.due_webhooks(session, limit)

    def _claim(self, webhook_id: str) -> Dispatch | None:
        with self._database.write() as session:
            return deliveries.claim_due(session, webhook_id, self._timeout_seconds + LEASE_MARGIN_SECONDS)

    def _record(self, sent: Dispatch, reply: Reply, go_on: bool) -> Dispatch | None:
        """Write how the try went, and take the webhook's next message in the same transaction."""
        with self._database.write() as session:
            if reply.delivered and reply.status is not None:
                deliveries.record_delivered(session, sent, reply.status)
            else:
                deliveries.record_failure(
                    session,
                    sent,
                    reply.error or "no reason given",
                    status=reply.status,
                    retry_after=reply.retry_after,
                    gone=reply.gone,
                )
            if not go_on:
                return None
            return deliveries.claim_due(session, sent.webhook_id, self._timeout_seconds + LEASE_MARGIN_SECONDS)
