"""Webhooks: who wants to be told of which ends of jobs, and the message that is written together with such an end."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from artifacts.errors import Conflict, FieldError, NotFound, RequestInvalid, StateConflict
from storage import database
from storage.ids import new_id
from storage.pagination import DEFAULT_LIMIT, Page, page_of
from storage.tables import ANONYMOUS, TERMINAL_STATES, JobRow, WebhookDeliveryRow, WebhookRow
from storage.text import is_storable, storable

JOB_EVENTS = tuple(f"job.{state}" for state in TERMINAL_STATES)
EVERY_EVENT = "*"
TEST_EVENT = "webhook.test"
MAX_WEBHOOKS = 100
"""Of one owner: every end of a job writes a message for each."""

URL_LIMIT = 2000
_SECRET_BYTES = 32
_SECRET_PREFIX = "whsec_"  # noqa: S105 (the prefix that Standard Webhooks gives to secrets)
_IS_PENDING = text("webhook_deliveries.state = 'pending'")


def create_webhook(
    session: Session,
    url: str,
    events: Sequence[str],
    *,
    description: str = "",
    owner: str = ANONYMOUS,
    created_by: str | None = None,
) -> WebhookRow:
    """A new, enabled webhook for the jobs of `owner`, with a secret of 32 random bytes.

    Whether messages may go to `url` is the sender's rule (`workers.egress`), not checked here.

    Raises:
        RequestInvalid: no event or an unknown one; a text that can not be stored.
        Conflict: the owner has `MAX_WEBHOOKS` already.
    """
    held = (
        select(func.count()).select_from(WebhookRow).where(WebhookRow.owner == owner, WebhookRow.deleted_at.is_(None))
    )
    if (session.scalar(held) or 0) >= MAX_WEBHOOKS:
        raise Conflict(f"there are {MAX_WEBHOOKS} webhooks already", hint="Delete one that is no longer needed.")
    row = WebhookRow(
        id=new_id("whk"),
        url=storable(url, "/url", URL_LIMIT),
        secret=_new_secret(),
        events=_checked(events),
        description=storable(description, "/description"),
        owner=owner,
        enabled=True,
        created_by=created_by,
        created_at=database.now(session),
    )
    session.add(row)
    session.flush()
    return row


def get_webhook(session: Session, webhook_id: str, owner: str) -> WebhookRow:
    """A webhook of this owner; those of others are not told of.

    Raises:
        NotFound
    """
    row = session.get(WebhookRow, webhook_id) if is_storable(webhook_id) else None
    if row is None or row.owner != owner or row.deleted_at is not None:
        raise NotFound(f"there is no webhook {webhook_id!r}")
    return row


def list_webhooks(
    session: Session, owner: str, cursor: str | None = None, limit: int = DEFAULT_LIMIT
) -> Page[WebhookRow]:
    """The owner's webhooks, newest first.

    Raises:
        RequestInvalid: a bad cursor or limit.
    """
    statement = select(WebhookRow).where(WebhookRow.owner == owner, WebhookRow.deleted_at.is_(None))
    keys = (WebhookRow.created_at, WebhookRow.id)
    return page_of(
        session,
        statement,
        keys,
        filters={"owner": owner},
        cursor=cursor,
        limit=limit,
        fixed=[(WebhookRow.owner, owner)],
    )


def update_webhook(
    session: Session,
    webhook_id: str,
    owner: str,
    *,
    url: str | None = None,
    events: Sequence[str] | None = None,
    description: str | None = None,
    enabled: bool | None = None,
) -> WebhookRow:
    """Change what is given. Disabling also gives up the messages that wait; enabling brings none of them back.

    Raises:
        NotFound
        RequestInvalid: as in `create_webhook`.
    """
    row = _lock(session, webhook_id, owner)
    if url is not None:
        row.url = storable(url, "/url", URL_LIMIT)
    if events is not None:
        row.events = _checked(events)
    if description is not None:
        row.description = storable(description, "/description")
    if enabled is not None:
        row.enabled = enabled
        if not enabled:
            give_up_waiting(session, row.id, "the webhook was disabled")
    session.flush()
    return row


def rotate_secret(session: Session, webhook_id: str, owner: str) -> WebhookRow:
    """Give the webhook a new secret. All that is sent from now on, also again, is signed with it.

    Raises:
        NotFound
    """
    row = _lock(session, webhook_id, owner)
    row.secret = _new_secret()
    session.flush()
    return row


def delete_webhook(session: Session, webhook_id: str, owner: str) -> None:
    """Hide the webhook and give up the messages that wait.

    Raises:
        NotFound
    """
    row = _lock(session, webhook_id, owner)
    row.deleted_at, row.enabled = database.now(session), False
    give_up_waiting(session, row.id, "the webhook was deleted")
    session.flush()


def enqueue_job_end(session: Session, job: JobRow, moment: datetime) -> int:
    """Write a message for every webhook that wants to know how this job has ended: part of that very transaction.

    Returns:
        The number of messages.
    """
    event = f"job.{job.state}"
    hooks = session.scalars(
        select(WebhookRow).where(WebhookRow.owner == job.owner, WebhookRow.deleted_at.is_(None)).order_by(WebhookRow.id)
    )
    listening = [hook for hook in hooks if hook.enabled and not {event, EVERY_EVENT}.isdisjoint(hook.events)]
    if listening:
        payload = _payload(event, moment, _job_data(job, moment))
        session.add_all(_delivery(hook, event, payload, moment, job.id) for hook in listening)
    return len(listening)


def enqueue_test(session: Session, webhook_id: str, owner: str) -> WebhookDeliveryRow:
    """Write a message that only says that the webhook works, whatever events it listens to.

    Raises:
        NotFound
        StateConflict: the webhook is disabled.
    """
    hook = get_webhook(session, webhook_id, owner)
    require_enabled(hook)
    moment = database.now(session)
    data = {"webhook": hook.id, "message": "This is a test. Nothing has happened."}
    row = _delivery(hook, TEST_EVENT, _payload(TEST_EVENT, moment, data), moment, None)
    session.add(row)
    session.flush()
    return row


def require_enabled(hook: WebhookRow) -> None:
    """Raises StateConflict for a webhook that is disabled."""
    if not hook.enabled:
        raise StateConflict(f"{hook.id} is disabled: nothing is sent to it", hint="Enable it first.")


def lock_webhook(session: Session, webhook_id: str) -> WebhookRow:
    """The webhook's row as it is now, locked against other changes; jobs may still write messages for it."""
    statement = select(WebhookRow).where(WebhookRow.id == webhook_id).with_for_update(key_share=True)
    return session.scalars(statement.execution_options(populate_existing=True)).one()


def give_up_waiting(session: Session, webhook_id: str, reason: str) -> None:
    """The messages of a webhook that wait are failed for `reason`; whoever wants them replays them."""
    lock_webhook(session, webhook_id)  # always before its messages: two that give up can not wait for each other
    session.execute(
        update(WebhookDeliveryRow)
        .where(WebhookDeliveryRow.webhook_id == webhook_id, _IS_PENDING)
        .values(state="failed", last_error=reason, finished_at=database.now(session))
        .execution_options(synchronize_session="fetch")
    )


def _lock(session: Session, webhook_id: str, owner: str) -> WebhookRow:
    get_webhook(session, webhook_id, owner)
    lock_webhook(session, webhook_id)
    return get_webhook(session, webhook_id, owner)


def _new_secret() -> str:
    return _SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode("ascii")


def _checked(events: Sequence[str]) -> list[str]:
    """The events in the order of the tree, each once; "*" swallows the others."""
    known = (*JOB_EVENTS, EVERY_EVENT)
    unknown = [event for event in events if event not in known]
    if unknown or not events:
        problem = f"must be some of {', '.join(known)}, not {', '.join(unknown)[:200] or 'none'}"
        raise RequestInvalid(f"events {problem}", errors=[FieldError("/events", problem)])
    return [EVERY_EVENT] if EVERY_EVENT in events else [event for event in JOB_EVENTS if event in events]


def _delivery(
    hook: WebhookRow, event: str, payload: dict[str, Any], moment: datetime, job_id: str | None
) -> WebhookDeliveryRow:
    return WebhookDeliveryRow(
        id=new_id("msg"),
        webhook_id=hook.id,
        job_id=job_id,
        event=event,
        payload=payload,
        state="pending",
        attempts=0,
        available_at=moment,
        created_at=moment,
    )


def _payload(event: str, moment: datetime, data: dict[str, Any]) -> dict[str, Any]:
    return {"type": event, "timestamp": _stamp(moment), "data": data}


def _job_data(job: JobRow, moment: datetime) -> dict[str, Any]:
    """What a receiver needs to act on; the whole job is at `links.job`."""
    result = job.result or {}
    adapters = list(result.get("adapters", ()))
    error = None
    if job.state == "failed":
        error = {name: (job.error or {}).get(name) for name in ("code", "detail", "hint")}
    return {
        "job": job.id,
        "kind": job.kind,
        "state": job.state,
        "attempt": job.attempt,
        "result": {"adapters": adapters, "images": list(result.get("images", ()))} if job.result is not None else None,
        "error": error,
        "created_at": _stamp(job.created_at),
        "started_at": None if job.started_at is None else _stamp(job.started_at),
        "finished_at": _stamp(moment),
        "links": {"job": f"/jobs/{job.id}", "adapters": [f"/adapters/{adapter}" for adapter in adapters]},
    }


def _stamp(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")
