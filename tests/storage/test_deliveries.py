from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event, select, update

from artifacts.errors import NotFound, RequestInvalid, StateConflict
from storage import deliveries, webhooks
from storage.database import Database, now
from storage.deliveries import BACKOFF_SECONDS, JITTER, MAX_TRIES, Dispatch
from storage.tables import WebhookDeliveryRow, WebhookRow

OWNER = "anonymous"
URL = "https://hooks.example.com/in"


def create(database: Database, tests: int = 0) -> WebhookRow:
    """A webhook with so many test messages due."""
    with database.write() as session:
        row = webhooks.create_webhook(session, URL, ["*"])
        for _ in range(tests):
            webhooks.enqueue_test(session, row.id, OWNER)
        return row


def claim(database: Database, row: WebhookRow, lease_seconds: float = 30) -> Dispatch | None:
    with database.write() as session:
        return deliveries.claim_due(session, row.id, lease_seconds)


def must_claim(database: Database, row: WebhookRow, lease_seconds: float = 30) -> Dispatch:
    found = claim(database, row, lease_seconds)
    assert found is not None
    return found


def stored(database: Database, identifier: str) -> WebhookDeliveryRow:
    with database.read() as session:
        return session.get_one(WebhookDeliveryRow, identifier)


def deliveries_of(database: Database, row: WebhookRow, state: str) -> list[str]:
    with database.read() as session:
        return [item.id for item in deliveries.list_deliveries(session, row.id, OWNER, state).items]


def make_due(database: Database) -> None:
    """As if all back-off and every lease were over."""
    with database.write() as session:
        session.execute(update(WebhookDeliveryRow).values(available_at=now(session) - timedelta(seconds=1)))


def fail(database: Database, sent: Dispatch, **options: object) -> str | None:
    with database.write() as session:
        return deliveries.record_failure(session, sent, "the receiver answered 500", status=500, **options)  # type: ignore[arg-type]


def test_a_claim_holds_a_message_for_its_lease(database: Database) -> None:
    row = create(database, 1)
    sent = must_claim(database, row)
    assert (sent.webhook_id, sent.url, sent.secret, sent.attempt) == (row.id, row.url, row.secret, 1)
    assert sent.lease == sent.moment + timedelta(seconds=30)
    assert claim(database, row) is None
    with database.read() as session:
        assert deliveries.due_webhooks(session) == []
    make_due(database)
    with database.read() as session:
        assert deliveries.due_webhooks(session) == [row.id]
    assert must_claim(database, row).attempt == 2, "the first sender has died: its lease is over"


def test_the_oldest_due_message_comes_first(database: Database) -> None:
    row = create(database, 3)
    ids = [must_claim(database, row).id for _ in range(3)]
    assert ids == sorted(ids)
    assert len(set(ids)) == 3


def test_webhooks_are_due_by_the_age_of_their_oldest_message(database: Database) -> None:
    first, second, idle = create(database, 1), create(database, 1), create(database)
    with database.write() as session:
        webhooks.enqueue_test(session, first.id, OWNER)
    with database.read() as session:
        assert deliveries.due_webhooks(session) == [first.id, second.id]
        assert deliveries.due_webhooks(session, limit=1) == [first.id]
    assert claim(database, idle) is None


def test_a_delivered_message_is_over(database: Database) -> None:
    row = create(database, 1)
    sent = must_claim(database, row)
    with database.write() as session:
        assert deliveries.record_delivered(session, sent, 204)
    found = stored(database, sent.id)
    assert (found.state, found.attempts, found.last_status, found.last_error) == ("delivered", 1, 204, None)
    assert found.finished_at is not None
    make_due(database)
    assert claim(database, row) is None


def test_a_sender_whose_lease_is_over_writes_nothing(database: Database) -> None:
    row = create(database, 1)
    late = must_claim(database, row)
    make_due(database)
    current = must_claim(database, row)
    with database.write() as session:
        assert not deliveries.record_delivered(session, late, 200)
        assert deliveries.record_failure(session, late, "slow") is None
        assert deliveries.record_failure(session, late, "gone", status=410, gone=True) is None
    found = stored(database, current.id)
    assert (found.state, found.attempts, found.last_error) == ("pending", 2, None)
    with database.read() as session:
        assert webhooks.get_webhook(session, row.id, OWNER).enabled
    with database.write() as session:
        assert deliveries.record_delivered(session, current, 200)


def test_a_replayed_message_is_not_that_of_an_earlier_sender(database: Database) -> None:
    row = create(database, 1)
    late = must_claim(database, row)
    make_due(database)
    second = must_claim(database, row)
    with database.write() as session:
        deliveries.record_delivered(session, second, 200)
        deliveries.replay(session, row.id, second.id, OWNER)
    third = must_claim(database, row, lease_seconds=31)
    assert third.attempt == late.attempt
    with database.write() as session:
        assert not deliveries.record_delivered(session, late, 200)


def test_failures_back_off_and_end(database: Database) -> None:
    row = create(database, 1)
    for number in range(1, MAX_TRIES + 1):
        sent = must_claim(database, row)
        assert sent.attempt == number
        state = fail(database, sent)
        found = stored(database, sent.id)
        assert (found.last_status, found.last_error) == (500, "the receiver answered 500")
        assert state == found.state == ("failed" if number == MAX_TRIES else "pending")
        if number < MAX_TRIES:
            with database.read() as session:
                took = (now(session) - sent.moment).total_seconds()
            waits = (found.available_at - sent.moment).total_seconds()
            base = BACKOFF_SECONDS[number - 1]
            assert base * (1 - JITTER) <= waits <= base * (1 + JITTER) + took
            assert base < 30 or claim(database, row) is None, "it waits"
            make_due(database)
    assert stored(database, sent.id).finished_at is not None
    make_due(database)
    assert claim(database, row) is None


def test_the_last_try_of_a_sender_that_died_is_the_last(database: Database) -> None:
    row = create(database, 2)
    first = must_claim(database, row)
    with database.write() as session:
        session.execute(update(WebhookDeliveryRow).where(WebhookDeliveryRow.id == first.id).values(attempts=MAX_TRIES))
    make_due(database)
    assert must_claim(database, row).id != first.id
    assert stored(database, first.id).state == "failed"


@pytest.mark.parametrize(("asked", "least", "most"), [(60, 60, 60), (10**9, 3600, 3600), (1, 4, 6)])
def test_a_receiver_may_ask_for_more_time(database: Database, asked: float, least: float, most: float) -> None:
    row = create(database, 1)
    sent = must_claim(database, row)
    fail(database, sent, retry_after=asked)
    with database.read() as session:
        took = (now(session) - sent.moment).total_seconds()
    wait = (stored(database, sent.id).available_at - sent.moment).total_seconds()
    assert least <= wait <= most + took


def test_any_text_of_an_error_can_be_written_down(database: Database) -> None:
    row = create(database, 1)
    sent = must_claim(database, row)
    with database.write() as session:
        assert deliveries.record_failure(session, sent, "bad \x00 \ud800 " + "x" * 1000) == "pending"
    told = stored(database, sent.id).last_error
    assert told is not None
    assert told.startswith("bad ? ? xx")
    assert len(told) <= 500


def test_gone_disables_the_webhook_and_gives_up_the_rest(database: Database) -> None:
    row, other = create(database, 3), create(database, 1)
    sent = must_claim(database, row)
    with database.write() as session:
        assert deliveries.record_failure(session, sent, "answered 410", status=410, gone=True) == "failed"
    with database.read() as session:
        assert not webhooks.get_webhook(session, row.id, OWNER).enabled
        states = session.execute(select(WebhookDeliveryRow.webhook_id, WebhookDeliveryRow.state)).all()
    assert sorted(states) == sorted([(row.id, "failed")] * 3 + [(other.id, "pending")])


def test_a_message_that_came_after_the_disabling_is_given_up_by_the_claim(database: Database) -> None:
    row = create(database)
    with database.write() as session:
        webhooks.enqueue_test(session, row.id, OWNER)
        session.get_one(WebhookRow, row.id).enabled = False
    assert claim(database, row) is None
    with database.read() as session:
        assert [item.state for item in session.scalars(select(WebhookDeliveryRow))] == ["failed"]


def test_replay_sends_the_same_message_with_all_tries(database: Database) -> None:
    row = create(database, 1)
    sent = must_claim(database, row)
    with pytest.raises(StateConflict), database.write() as session:
        deliveries.replay(session, row.id, sent.id, OWNER)
    with database.write() as session:
        deliveries.record_delivered(session, sent, 200)
    with database.write() as session:
        deliveries.replay(session, row.id, sent.id, OWNER)
    again = must_claim(database, row)
    assert (again.id, again.payload, again.attempt) == (sent.id, sent.payload, 1)
    with database.write() as session:
        deliveries.record_failure(session, again, "gone", status=410, gone=True)
    with pytest.raises(StateConflict), database.write() as session:
        deliveries.replay(session, row.id, sent.id, OWNER)
    for unknown in ("msg_0", "msg_\x00"):
        with pytest.raises(NotFound), database.write() as session:
            deliveries.replay(session, row.id, unknown, OWNER)


def test_a_message_of_another_webhook_is_not_replayed(database: Database) -> None:
    row, other = create(database, 1), create(database)
    sent = must_claim(database, row)
    with pytest.raises(NotFound), database.write() as session:
        deliveries.replay(session, other.id, sent.id, OWNER)


def test_lists_are_pages_by_state(database: Database) -> None:
    row = create(database, 3)
    sent = must_claim(database, row)
    with database.write() as session:
        deliveries.record_delivered(session, sent, 200)
    with database.read() as session:
        first = deliveries.list_deliveries(session, row.id, OWNER, limit=2)
        second = deliveries.list_deliveries(session, row.id, OWNER, cursor=first.next, limit=2)
        done = deliveries.list_deliveries(session, row.id, OWNER, "delivered")
        with pytest.raises(RequestInvalid):
            deliveries.list_deliveries(session, row.id, OWNER, "lost")
    listed = [item.id for item in (*first.items, *second.items)]
    assert listed == sorted(listed, reverse=True)
    assert len(listed) == 3
    assert [item.id for item in done.items] == [sent.id]


def test_old_messages_are_forgotten_once_they_have_ended(database: Database) -> None:
    row = create(database, 3)
    sent = must_claim(database, row)
    with database.write() as session:
        deliveries.record_delivered(session, sent, 200)
        assert deliveries.forget_deliveries(session) == 0
        assert deliveries.forget_deliveries(session, timedelta(seconds=-60)) == 1
        assert deliveries.forget_deliveries(session, timedelta(seconds=-60)) == 0
    with database.read() as session:
        assert {item.state for item in session.scalars(select(WebhookDeliveryRow))} == {"pending"}


def test_many_senders_at_once_get_each_message_once(database: Database) -> None:
    row = create(database, 30)
    start = threading.Barrier(4)

    def work() -> list[str]:
        start.wait(20)
        found = []
        while True:
            sent = claim(database, row)
            if sent is None:
                return found
            found.append(sent.id)

    with ThreadPoolExecutor(4) as pool:
        taken = [identifier for part in [pool.submit(work) for _ in range(4)] for identifier in part.result(60)]
    # One that finds every due row locked by others leaves them to those: what it does not take is not lost.
    assert len(taken) == len(set(taken)) == 30


def test_disabling_and_410_at_once_do_not_lock_each_other_out(database: Database) -> None:
    row = create(database, 10)
    sent = must_claim(database, row)
    start = threading.Barrier(2)

    def disable() -> None:
        start.wait(20)
        with database.write() as session:
            webhooks.update_webhook(session, row.id, OWNER, enabled=False)

    def gone() -> None:
        start.wait(20)
        with database.write() as session:
            deliveries.record_failure(session, sent, "gone", status=410, gone=True)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(disable), pool.submit(gone)]:
            future.result(60)
    with database.read() as session:
        assert {item.state for item in session.scalars(select(WebhookDeliveryRow))} == {"failed"}


def test_what_has_ended_costs_the_sender_nothing(sqlite_template: Path, tmp_path: Path) -> None:
    """The statements of every second find what is due by an index that holds nothing else."""
    shutil.copyfile(sqlite_template, tmp_path / "plan.db")
    database = Database(f"sqlite:///{tmp_path / 'plan.db'}")
    row = create(database, 2)
    seen: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("SELECT") and "FROM webhook_deliveries" in statement:
            seen.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    with database.write() as session:
        deliveries.due_webhooks(session)
        deliveries.claim_due(session, row.id, 30)
    due, claimed = seen
    deliveries_of(database, row, "failed")
    listed = seen[-1]
    event.remove(database.engine, "before_cursor_execute", note)
    plans = []
    with database.engine.connect() as connection:
        for statement, parameters in (due, claimed, listed):
            steps = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            plans.append(" | ".join(step[3] for step in steps))
    database.dispose()
    assert "INDEX ix_webhook_deliveries_pending" in plans[0]
    assert "INDEX ix_webhook_deliveries_pending (webhook_id=? AND available_at<?)" in plans[1]
    assert "B-TREE" not in plans[1]
    assert "INDEX ix_webhook_deliveries_state (webhook_id=? AND state=?)" in plans[2]
    assert "B-TREE" not in plans[2]


@given(attempts=st.integers(-3, 50))
def test_back_off_stays_within_its_jitter(attempts: int) -> None:
    base = BACKOFF_SECONDS[min(max(attempts, 1), len(BACKOFF_SECONDS)) - 1]
    assert base * (1 - JITTER) <= deliveries.backoff_seconds(attempts) <= base * (1 + JITTER)
