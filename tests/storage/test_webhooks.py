from __future__ import annotations

import base64
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from artifacts.errors import Conflict, NotFound, RequestInvalid, StateConflict
from storage import deliveries, jobs, keys, webhooks
from storage.database import Database, now
from storage.tables import JobRow, WebhookDeliveryRow, WebhookRow
from storage.transitions import change_state

URL = "https://hooks.example.com/in?token=t0p"
OWNER = "anonymous"


def create(database: Database, *events: str, owner: str = OWNER, url: str = URL) -> WebhookRow:
    with database.write() as session:
        return webhooks.create_webhook(session, url, events or ("*",), owner=owner)


def end_job(session: Session, state: str, created_by: str | None = None, **values: Any) -> JobRow:
    """A job that ends in `state`, as a worker or a user would end it."""
    job = jobs.create_job(session, "merge", {"n": 1}, created_by=created_by)
    if state != "cancelled":
        change_state(session, job, "running", now(session))
    for name, value in values.items():
        setattr(job, name, value)
    change_state(session, job, state, now(session))
    session.flush()
    return job


def messages(database: Database, webhook: WebhookRow | None = None) -> list[WebhookDeliveryRow]:
    """All messages, the oldest first."""
    statement = select(WebhookDeliveryRow).order_by(WebhookDeliveryRow.id)
    if webhook is not None:
        statement = statement.where(WebhookDeliveryRow.webhook_id == webhook.id)
    with database.read() as session:
        return list(session.scalars(statement))


def test_a_webhook_is_made_with_a_strong_secret_of_its_own(database: Database) -> None:
    first, second = create(database, "job.failed", "job.succeeded"), create(database)
    assert first.id.startswith("whk_")
    assert first.enabled
    assert first.events == ["job.succeeded", "job.failed"]
    kind, _, encoded = first.secret.partition("_")
    assert kind == "whsec"
    assert len(base64.b64decode(encoded, validate=True)) == 32
    assert first.secret != second.secret


@pytest.mark.parametrize("events", [[], ["job.started"], ["job.failed", "webhook.test"]])
def test_unknown_events_are_refused(database: Database, events: list[str]) -> None:
    with pytest.raises(RequestInvalid) as raised, database.write() as session:
        webhooks.create_webhook(session, URL, events)
    assert raised.value.errors[0].pointer == "/events"
    row = create(database)
    with pytest.raises(RequestInvalid), database.write() as session:
        webhooks.update_webhook(session, row.id, OWNER, events=events)


def test_the_star_swallows_what_it_contains(database: Database) -> None:
    assert create(database, "job.failed", "*").events == ["*"]


def test_an_owner_has_a_limited_number(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "MAX_WEBHOOKS", 2)
    create(database)
    last = create(database)
    with pytest.raises(Conflict):
        create(database)
    create(database, owner="somebody")
    with database.write() as session:
        webhooks.delete_webhook(session, last.id, OWNER)
    create(database)


def test_webhooks_of_others_do_not_exist(database: Database) -> None:
    row = create(database, owner="somebody")
    calls = (
        lambda session: webhooks.get_webhook(session, row.id, OWNER),
        lambda session: webhooks.update_webhook(session, row.id, OWNER, enabled=False),
        lambda session: webhooks.rotate_secret(session, row.id, OWNER),
        lambda session: webhooks.delete_webhook(session, row.id, OWNER),
        lambda session: webhooks.enqueue_test(session, row.id, OWNER),
        lambda session: deliveries.list_deliveries(session, row.id, OWNER),
        lambda session: deliveries.replay(session, row.id, "msg_0", OWNER),
        lambda session: webhooks.get_webhook(session, "whk_\x00", OWNER),
    )
    for call in calls:
        with pytest.raises(NotFound), database.write() as session:
            call(session)
    with database.read() as session:
        assert webhooks.list_webhooks(session, OWNER).items == ()
        assert [item.id for item in webhooks.list_webhooks(session, "somebody").items] == [row.id]


def test_lists_are_pages_without_the_deleted(database: Database) -> None:
    rows = [create(database) for _ in range(3)]
    with database.write() as session:
        webhooks.delete_webhook(session, rows[1].id, OWNER)
    with database.read() as session:
        first = webhooks.list_webhooks(session, OWNER, limit=1)
        rest = webhooks.list_webhooks(session, OWNER, cursor=first.next, limit=1)
    assert [item.id for item in (*first.items, *rest.items)] == [rows[2].id, rows[0].id]
    assert rest.next is None


def test_changes_touch_only_what_they_name(database: Database) -> None:
    row = create(database, "job.failed")
    with database.write() as session:
        changed = webhooks.update_webhook(session, row.id, OWNER, url="https://b.example", description="new")
    assert (changed.url, changed.description, changed.events, changed.enabled) == (
        "https://b.example",
        "new",
        ["job.failed"],
        True,
    )
    assert changed.secret == row.secret


def test_a_rotated_secret_signs_what_waits_too(database: Database) -> None:
    row = create(database)
    with database.write() as session:
        webhooks.enqueue_test(session, row.id, OWNER)
        rotated = webhooks.rotate_secret(session, row.id, OWNER)
    assert rotated.secret != row.secret
    with database.write() as session:
        sent = deliveries.claim_due(session, row.id, 30)
    assert sent is not None
    assert sent.secret == rotated.secret
    assert rotated.secret not in repr(sent)
    assert "t0p" not in repr(sent)


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled"])
def test_an_end_is_told_to_those_who_listen(database: Database, state: str) -> None:
    every, one = create(database), create(database, f"job.{state}")
    other = {"succeeded": "job.failed", "failed": "job.cancelled", "cancelled": "job.succeeded"}[state]
    deaf, disabled, deleted = create(database, other), create(database), create(database)
    foreign = create(database, owner="somebody")
    with database.write() as session:
        webhooks.update_webhook(session, disabled.id, OWNER, enabled=False)
        webhooks.delete_webhook(session, deleted.id, OWNER)
        job = end_job(session, state)
    written = messages(database)
    assert [item.webhook_id for item in written] == [every.id, one.id]
    assert {deaf.id, disabled.id, deleted.id, foreign.id}.isdisjoint(item.webhook_id for item in written)
    assert all((item.job_id, item.event, item.state) == (job.id, f"job.{state}", "pending") for item in written)
    assert all(item.id.startswith("msg_") for item in written)


def test_a_key_is_told_of_its_own_jobs_only(database: Database) -> None:
    with database.write() as session:
        key = keys.create_key(session, "ci", ["jobs"])[0]
        own = webhooks.create_webhook(session, URL, ["*"], owner=key.id, created_by=key.id)
        webhooks.create_webhook(session, URL, ["*"])
        end_job(session, "succeeded", created_by=key.id)
    assert [item.webhook_id for item in messages(database)] == [own.id]


def test_the_message_says_what_a_receiver_acts_on(database: Database) -> None:
    create(database)
    error = {"code": "merge_refused", "detail": "no", "hint": "use cat", "exit": {"code": 0}, "log": ["secret line"]}
    with database.write() as session:
        good = end_job(session, "succeeded", result={"adapters": ["adp_1"], "images": [], "report": {"big": 1}})
        bad = end_job(session, "failed", error=error)
    first, second = (item.payload for item in messages(database))
    assert first == {
        "type": "job.succeeded",
        "timestamp": first["timestamp"],
        "data": {
            "job": good.id,
            "kind": "merge",
            "state": "succeeded",
            "attempt": 0,
            "result": {"adapters": ["adp_1"], "images": []},
            "error": None,
            "created_at": first["data"]["created_at"],
            "started_at": first["data"]["started_at"],
            "finished_at": first["timestamp"],
            "links": {"job": f"/jobs/{good.id}", "adapters": ["/adapters/adp_1"]},
        },
    }
    assert first["timestamp"].endswith("Z")
    assert second["data"]["error"] == {"code": "merge_refused", "detail": "no", "hint": "use cat"}
    assert second["data"]["result"] is None
    assert second["data"]["links"]["job"] == f"/jobs/{bad.id}"


def test_a_message_is_in_the_transaction_of_the_end(database: Database) -> None:
    create(database)

    class Abort(Exception):
        pass

    with pytest.raises(Abort), database.write() as session:
        end_job(session, "failed")
        session.flush()
        raise Abort
    assert messages(database) == []
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(JobRow)) == 0


def test_a_queued_job_that_is_cancelled_by_its_user_is_told(database: Database) -> None:
    create(database)
    with database.write() as session:
        job = jobs.create_job(session, "merge", {})
    with database.write() as session:
        jobs.request_cancel(session, job.id)
    assert [item.event for item in messages(database)] == ["job.cancelled"]


def test_a_test_goes_to_a_webhook_whatever_it_listens_to(database: Database) -> None:
    row = create(database, "job.failed")
    with database.write() as session:
        sent = webhooks.enqueue_test(session, row.id, OWNER)
        webhooks.update_webhook(session, row.id, OWNER, enabled=True)
    assert (sent.event, sent.payload["type"], sent.payload["data"]["webhook"]) == (
        "webhook.test",
        "webhook.test",
        row.id,
    )
    with database.write() as session:
        webhooks.update_webhook(session, row.id, OWNER, enabled=False)
    with pytest.raises(StateConflict), database.write() as session:
        webhooks.enqueue_test(session, row.id, OWNER)


@pytest.mark.parametrize("how", ["disable", "delete"])
def test_what_waits_is_given_up_with_the_webhook(database: Database, how: str) -> None:
    row, other = create(database), create(database)
    with database.write() as session:
        webhooks.enqueue_test(session, row.id, OWNER)
        webhooks.enqueue_test(session, other.id, OWNER)
    with database.write() as session:
        if how == "disable":
            webhooks.update_webhook(session, row.id, OWNER, enabled=False)
        else:
            webhooks.delete_webhook(session, row.id, OWNER)
    (given_up,), (kept,) = messages(database, row), messages(database, other)
    assert given_up.state == "failed"
    assert given_up.finished_at is not None
    assert how in str(given_up.last_error)
    assert kept.state == "pending"
