"""Real HTTP servers on loopback that receive webhooks, and what tests do with the outbox."""

from __future__ import annotations

import datetime
import http.server
import ipaddress
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import select, update

from storage import webhooks
from storage.database import Database, now
from storage.tables import WebhookDeliveryRow, WebhookRow
from workers.courier import Courier
from workers.egress import EgressPolicy

OWNER = "anonymous"
LOOPBACK = EgressPolicy(allow_http=True, allowed_networks=(ipaddress.ip_network("127.0.0.0/8"),))
DEADLINE = 90.0


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        pause.wait(0.01)


@dataclass
class Receiver:
    """A real HTTP server on loopback that keeps what it got. `answers` are used up one by one; then 204."""

    host: str = "127.0.0.1"
    answers: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    got: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    hold: threading.Event | None = None
    tls: ssl.SSLContext | None = None
    journal: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.got.append((self.path, {key.lower(): value for key, value in self.headers.items()}, body))
                receiver.journal.append(receiver.port)
                if receiver.hold is not None:
                    receiver.hold.wait(DEADLINE)
                status, headers, content = receiver.answers.pop(0) if receiver.answers else (204, {}, b"")
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                except (BrokenPipeError, ConnectionResetError):
                    return  # the courier has read enough, or no longer waits

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                return

        self.server = http.server.ThreadingHTTPServer((self.host, 0), Handler)
        if self.tls is not None:
            self.server.socket = self.tls.wrap_socket(self.server.socket, server_side=True)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/in?token=t0ken"

    def ids(self) -> list[str]:
        return [headers["webhook-id"] for _, headers, _ in self.got]

    def close(self) -> None:
        if self.hold is not None:
            self.hold.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(DEADLINE)


@pytest.fixture
def receivers() -> Iterator[Callable[..., Receiver]]:
    """Makes receivers; they end with the test."""
    made: list[Receiver] = []

    def make(**options: Any) -> Receiver:
        made.append(Receiver(**options))
        return made[-1]

    yield make
    for receiver in made:
        receiver.close()


def create(database: Database, url: str, tests: int = 1) -> WebhookRow:
    """A webhook with so many test messages due."""
    with database.write() as session:
        row = webhooks.create_webhook(session, url, ["*"])
        for _ in range(tests):
            webhooks.enqueue_test(session, row.id, OWNER)
        return row


def messages(database: Database, webhook: WebhookRow) -> list[WebhookDeliveryRow]:
    statement = select(WebhookDeliveryRow).where(WebhookDeliveryRow.webhook_id == webhook.id)
    with database.read() as session:
        return list(session.scalars(statement.order_by(WebhookDeliveryRow.id)))


def states(database: Database, webhook: WebhookRow) -> list[str]:
    return [item.state for item in messages(database, webhook)]


def make_due(database: Database) -> None:
    """As if all back-off and every lease were over."""
    with database.write() as session:
        session.execute(update(WebhookDeliveryRow).values(available_at=now(session) - datetime.timedelta(seconds=1)))


def send(database: Database, policy: EgressPolicy = LOOPBACK, **options: Any) -> None:
    """One round of a courier of its own."""
    Courier(database, policy, **options).run()
