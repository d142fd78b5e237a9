from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session
from standardwebhooks import Webhook
from structlog.testing import capture_logs
from webhook_receivers import (
    DEADLINE,
    LOOPBACK,
    OWNER,
    Receiver,
    create,
    make_due,
    messages,
    send,
    states,
    wait_for,
)

from artifacts.errors import DatabaseUnavailable
from storage import deliveries, jobs, webhooks
from storage.database import Database
from storage.deliveries import Dispatch
from storage.tables import WebhookDeliveryRow, WebhookRow
from workers import courier as courier_module
from workers.courier import Courier


def test_nothing_due_is_nothing_done(database: Database, receivers: Callable[..., Receiver]) -> None:
    receiver = receivers()
    row = create(database, receiver.url, tests=0)
    send(database)
    assert receiver.got == []
    assert messages(database, row) == []


def test_the_end_of_a_job_arrives_signed(database: Database, receivers: Callable[..., Receiver]) -> None:
    receiver = receivers()
    row = create(database, receiver.url, tests=0)
    with database.write() as session:
        job = jobs.create_job(session, "merge", {})
    with database.write() as session:
        jobs.request_cancel(session, job.id)
    send(database)
    ((path, headers, body),) = receiver.got
    (message,) = messages(database, row)
    assert path == "/in?token=t0ken"
    assert headers["host"] == f"127.0.0.1:{receiver.port}"
    assert headers["content-type"] == "application/json"
    assert headers["webhook-id"] == message.id
    content = Webhook(row.secret).verify(body, headers)
    assert content == json.loads(body) == message.payload
    assert content["type"] == "job.cancelled"
    assert content["data"]["job"] == job.id
    assert (message.state, message.attempts, message.last_status) == ("delivered", 1, 204)
    with pytest.raises(Exception, match="No matching signature"):
        Webhook(row.secret).verify(body.replace(b"job.cancelled", b"job.succeeded"), headers)


def test_text_of_any_script_is_signed_as_it_is_sent(database: Database, receivers: Callable[..., Receiver]) -> None:
    receiver = receivers()
    row = create(database, receiver.url)
    payload = {"type": "webhook.test", "timestamp": "t", "data": {"text": 'Grüße, "Δ" 日本 \\ \n'}}
    with database.write() as session:
        session.execute(update(WebhookDeliveryRow).values(payload=payload))
    send(database)
    ((_, headers, body),) = receiver.got
    assert Webhook(row.secret).verify(body, headers) == payload


def test_many_messages_go_in_their_order(database: Database, receivers: Callable[..., Receiver]) -> None:
    receiver = receivers()
    row = create(database, receiver.url, tests=courier_module.MESSAGES_PER_TURN + 5)
    send(database)
    assert receiver.ids() == [item.id for item in messages(database, row)]
    assert set(states(database, row)) == {"delivered"}


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
def test_other_answers_are_tried_again(database: Database, receivers: Callable[..., Receiver], status: int) -> None:
    receiver = receivers(answers=[(status, {"Retry-After": "100"}, b"a secret of the receiver")])
    row = create(database, receiver.url)
    send(database)
    (first,) = messages(database, row)
    assert (first.state, first.attempts, first.last_status) == ("pending", 1, status)
    assert str(status) in str(first.last_error)
    assert "secret" not in str(first.last_error), "what the receiver says is not kept"
    waits = (first.available_at - first.created_at).total_seconds()
    assert (waits >= 100) == (status in (429, 503))
    make_due(database)
    send(database)
    (second,) = messages(database, row)
    assert (second.state, second.attempts, second.last_status) == ("delivered", 2, 204)
    assert len(set(receiver.ids())) == 1, "every try has the same webhook-id"
    for _, headers, body in receiver.got:
        Webhook(row.secret).verify(body, headers)


def test_a_message_is_given_up_after_the_last_try(database: Database, receivers: Callable[..., Receiver]) -> None:
    receiver = receivers(answers=[(500, {}, b"")] * deliveries.MAX_TRIES)
    row = create(database, receiver.url)
    for _ in range(deliveries.MAX_TRIES + 2):
        send(database)
        make_due(database)
    assert len(receiver.got) == deliveries.MAX_TRIES
    assert states(database, row) == ["failed"]


def test_gone_disables_the_webhook(database: Database, receivers: Callable[..., Receiver]) -> None:
    receiver = receivers(answers=[(410, {}, b"")])
    row = create(database, receiver.url, tests=3)
    send(database)
    assert len(receiver.got) == 1
    assert states(database, row) == ["failed"] * 3
    with database.read() as session:
        assert not webhooks.get_webhook(session, row.id, OWNER).enabled


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(database: Database, receivers: Callable[..., Receiver], status: int) -> None:
    target = receivers()
    receiver = receivers(answers=[(status, {"Location": target.url}, b"")])
    row = create(database, receiver.url)
    send(database)
    assert target.got == []
    (message,) = messages(database, row)
    assert (message.state, message.last_status) == ("pending", status)
    assert "redirects are not followed" in str(message.last_error)


def test_a_long_answer_is_not_read(database: Database, receivers: Callable[..., Receiver]) -> None:
    receiver = receivers(answers=[(200, {}, b"x" * 50_000_000)])
    row = create(database, receiver.url)
    send(database)
    assert states(database, row) == ["delivered"]


def test_a_bomb_is_not_unpacked(database: Database, receivers: Callable[..., Receiver]) -> None:
    receiver = receivers(answers=[(200, {"Content-Encoding": "gzip"}, b"no gzip at all")])
    row = create(database, receiver.url)
    send(database)
    assert states(database, row) == ["delivered"]


def test_a_slow_receiver_does_not_block_the_others(database: Database, receivers: Callable[..., Receiver]) -> None:
    slow, quick = receivers(hold=threading.Event()), receivers()
    held = create(database, slow.url, tests=3)
    courier = Courier(database, LOOPBACK, timeout_seconds=DEADLINE)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(courier.run)
        wait_for(lambda: len(slow.got) == 1)
        others = [create(database, quick.url, tests=5) for _ in range(2)]  # written while the slow one is waited for
        wait_for(lambda: len(quick.got) == 10)
        wait_for(lambda: {state for row in others for state in states(database, row)} == {"delivered"})
        assert states(database, held) == ["pending"] * 3
        assert len(slow.got) == 1, "one lane for each webhook"
        assert slow.hold is not None
        slow.hold.set()
        running.result(DEADLINE)
    assert states(database, held) == ["delivered"] * 3


def test_dead_receivers_do_not_starve_a_new_one(database: Database, receivers: Callable[..., Receiver]) -> None:
    journal: list[int] = []
    dead = [receivers(answers=[(500, {}, b"")] * 10, journal=journal) for _ in range(3)]
    for receiver in dead:
        create(database, receiver.url, tests=10)
    healthy = receivers(journal=journal)
    row = create(database, healthy.url)
    send(database, lanes=1)
    assert states(database, row) == ["delivered"]
    assert journal.index(healthy.port) == 3, "behind one turn of each of the others"
    assert all(journal.count(receiver.port) >= 10 for receiver in dead)


class Dripper:
    """Accepts connections and sends an endless header, a byte at a time."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/"

    def _serve(self) -> None:
        try:
            connection, _ = self.listener.accept()
        except OSError:
            return
        with connection:
            try:
                connection.sendall(b"HTTP/1.1 200 OK\r\nx-drip: ")
                while not self.stopping.wait(0.02):
                    connection.sendall(b"x")
            except OSError:
                return

    def close(self) -> None:
        self.stopping.set()
        self.listener.close()
        self.thread.join(DEADLINE)


def test_the_time_out_is_for_the_whole_try(database: Database) -> None:
    dripper = Dripper()
    row = create(database, dripper.url)
    began = time.monotonic()
    send(database, timeout_seconds=0.5)
    took = time.monotonic() - began
    dripper.close()
    (message,) = messages(database, row)
    assert (message.state, message.last_status) == ("pending", None)
    assert message.last_error == "no answer within 0.5 s"
    assert took < DEADLINE / 2


def test_an_answer_whose_body_never_ends_is_an_answer(database: Database, receivers: Callable[..., Receiver]) -> None:
    receiver = receivers(answers=[(200, {"Content-Length": "100"}, b"only the start")])
    row = create(database, receiver.url)
    send(database, timeout_seconds=1.0)
    assert states(database, row) == ["delivered"]


def test_a_closed_port_is_a_failure(database: Database) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    row = create(database, f"http://127.0.0.1:{port}/")
    send(database)
    (message,) = messages(database, row)
    assert message.state == "pending"
    assert str(message.last_error).startswith("no connection")


def test_two_couriers_send_each_message_once(database: Database, receivers: Callable[..., Receiver]) -> None:
    receiver = receivers()
    rows = [create(database, receiver.url, tests=20) for _ in range(2)]
    other = Database(database.url.render_as_string(hide_password=False))
    couriers = [Courier(database, LOOPBACK), Courier(other, LOOPBACK)]
    try:
        with ThreadPoolExecutor(2) as pool:
            for running in [pool.submit(courier.run) for courier in couriers]:
                running.result(DEADLINE * 2)
    finally:
        other.dispose()
    assert sorted(receiver.ids()) == sorted(item.id for row in rows for item in messages(database, row))
    assert all(set(states(database, row)) == {"delivered"} for row in rows)


def test_close_ends_a_round_and_the_message_waits_for_the_next_server(
    database: Database, receivers: Callable[..., Receiver]
) -> None:
    receiver = receivers(hold=threading.Event())
    row = create(database, receiver.url)
    courier = Courier(database, LOOPBACK, timeout_seconds=DEADLINE)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(courier.run)
        wait_for(lambda: len(receiver.got) == 1)
        courier.close()
        running.result(DEADLINE / 2)
    assert states(database, row) == ["pending"]
    make_due(database)
    courier.run()
    assert len(receiver.got) == 1, "closed for good"
    assert receiver.hold is not None
    receiver.hold.set()
    send(database)
    assert states(database, row) == ["delivered"]


def test_a_database_that_goes_away_costs_no_answer_of_the_others(
    database: Database, receivers: Callable[..., Receiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick, slow = receivers(), receivers(hold=threading.Event())
    lost, kept = create(database, quick.url), create(database, slow.url)
    record, failed = deliveries.record_delivered, threading.Event()

    def away_once(session: Session, sent: Dispatch, status: int) -> bool:
        if sent.webhook_id == lost.id and not failed.is_set():
            failed.set()
            raise DatabaseUnavailable("gone for a moment")
        return record(session, sent, status)

    monkeypatch.setattr(deliveries, "record_delivered", away_once)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(send, database, timeout_seconds=DEADLINE)
        wait_for(lambda: failed.is_set() and len(slow.got) == 1)
        assert slow.hold is not None
        slow.hold.set()
        with pytest.raises(DatabaseUnavailable):
            running.result(DEADLINE)
    assert states(database, kept) == ["delivered"]
    assert states(database, lost) == ["pending"]
    make_due(database)
    send(database)
    assert states(database, lost) == ["delivered"]
    assert len(set(quick.ids())) == 1
    assert len(quick.got) == 2, "at least once: sent again with the same id"


def test_secrets_are_not_logged(database: Database, receivers: Callable[..., Receiver]) -> None:
    receiver = receivers(answers=[(500, {}, b"")])
    row = create(database, receiver.url)
    with capture_logs() as logs:
        send(database)
        make_due(database)
        send(database)
    text = repr(logs)
    assert [entry["event"] for entry in logs] == ["webhook_failed", "webhook_sent"]
    assert row.secret not in text
    assert row.secret.removeprefix("whsec_") not in text
    assert "t0ken" not in text


def test_a_message_that_can_not_be_sent_stops_no_other(
    database: Database, receivers: Callable[..., Receiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = receivers()
    broken, whole = create(database, receiver.url), create(database, receiver.url)
    with database.write() as session:
        session.get_one(WebhookRow, broken.id).secret = "whsec_"
    with capture_logs() as logs:
        send(database)
    assert states(database, whole) == ["delivered"]
    (message,) = messages(database, broken)
    assert message.last_error == "could not be sent: EmptyWebhookSecretError"
    assert "webhook_not_sendable" in {entry["event"] for entry in logs}
