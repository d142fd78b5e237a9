"""The outbox of the webhooks: what is due, who sends it now, how it went. At least once, in no fixed order.

A sender holds a message by moving its `available_at` to the end of its lease; a sender that dies loses it to the next
one. What a sender writes counts only while it holds the message. All times are the database's.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import delete, func, select, text
from sqlalchemy.orm import Session

from artifacts.errors import FieldError, NotFound, RequestInvalid, StateConflict
from storage import database, webhooks
from storage.pagination import DEFAULT_LIMIT, Page, page_of
from storage.tables import WebhookDeliveryRow, WebhookRow
from storage.text import is_storable

STATES = ("pending", "delivered", "failed")
BACKOFF_SECONDS = (5, 30, 120, 600, 1800, 3600, 7200)
"""Before the second try, the third …; each is stretched or shortened by up to `JITTER`."""

MAX_TRIES = len(BACKOFF_SECONDS) + 1
JITTER = 0.2
LONGEST_ASKED_SECONDS = 3600
"""How far a receiver can put a try off with Retry-After."""

KEEP = timedelta(days=30)
_ERROR_LIMIT = 500
_IS_PENDING = text("webhook_deliveries.state = 'pending'")
_random = secrets.SystemRandom()


@dataclass(frozen=True, slots=True)
class Dispatch:
    """A message to send now, as try number `attempt`; it is the sender's until `lease`."""

    id: str
    webhook_id: str
    url: str = field(repr=False)  # may carry a token
    secret: str = field(repr=False)
    event: str
    payload: dict[str, Any] = field(repr=False)
    attempt: int
    moment: datetime
    lease: datetime


def due_webhooks(session: Session, limit: int = 1000) -> list[str]:
    """The webhooks that have a message due, the one that waits longest first."""
    statement = (
        select(WebhookDeliveryRow.webhook_id)
        .where(_IS_PENDING, WebhookDeliveryRow.available_at <= database.now(session))
        .group_by(WebhookDeliveryRow.webhook_id)
        .order_by(func.min(WebhookDeliveryRow.available_at), WebhookDeliveryRow.webhook_id)
        .limit(limit)
    )
    return list(session.scalars(statement))


def claim_due(session: Session, webhook_id: str, lease_seconds: float) -> Dispatch | None:
    """Hold the webhook's next due message for `lease_seconds`; None if none is due or the webhook is off.

    However many servers ask at once, a message goes to one of them.
    """
    moment = database.now(session)
    hook = session.get(WebhookRow, webhook_id, populate_existing=True)
    if hook is None or not hook.enabled:
        webhooks.give_up_waiting(session, webhook_id, "the webhook was disabled")
        return None
    due = (
        select(WebhookDeliveryRow)
        .where(WebhookDeliveryRow.webhook_id == webhook_id, _IS_PENDING, WebhookDeliveryRow.available_at <= moment)
        .order_by(WebhookDeliveryRow.available_at, WebhookDeliveryRow.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    )
    while (row := session.scalars(due).one_or_none()) is not None:
        if row.attempts < MAX_TRIES:
            row.attempts += 1
            row.available_at = moment + timedelta(seconds=lease_seconds)
            session.flush()
            return Dispatch(
                id=row.id,
                webhook_id=hook.id,
                url=hook.url,
                secret=hook.secret,
                event=row.event,
                payload=row.payload,
                attempt=row.attempts,
                moment=moment,
                lease=row.available_at,
            )
        _finish(row, "failed", row.last_status, "the server that made the last try gave no word of how it went", moment)
        session.flush()
    return None


def record_delivered(session: Session, sent: Dispatch, status: int) -> bool:
    """The receiver has taken the message. False if the message was no longer the sender's: nothing is written."""
    row = _held(session, sent)
    if row is None:
        return False
    _finish(row, "delivered", status, None, database.now(session))
    session.flush()
    return True


def record_failure(
    session: Session,
    sent: Dispatch,
    error: str,
    *,
    status: int | None = None,
    retry_after: float = 0.0,
    gone: bool = False,
) -> Literal["pending", "failed"] | None:
    """The try has failed: again after a while, at most `MAX_TRIES` times in all.

    Args:
        status: the receiver's HTTP status, if it gave one.
        retry_after: seconds that the receiver asked to be left alone, at most `LONGEST_ASKED_SECONDS` count.
        gone: the receiver wants no more (410): the webhook is disabled.

    Returns:
        The message's state; None if it was no longer the sender's, and nothing was written.
    """
    if gone:  # the webhook is locked before its messages, as everywhere
        webhooks.lock_webhook(session, sent.webhook_id)
    row = _held(session, sent)
    if row is None:
        return None
    moment = database.now(session)
    if gone or row.attempts >= MAX_TRIES:
        _finish(row, "failed", status, error, moment)
    else:
        row.last_status, row.last_error = status, _told(error)
        wait = max(backoff_seconds(row.attempts), min(retry_after, LONGEST_ASKED_SECONDS))
        row.available_at = moment + timedelta(seconds=wait)
    session.flush()
    if gone:
        webhooks.lock_webhook(session, sent.webhook_id).enabled = False
        webhooks.give_up_waiting(
            session, sent.webhook_id, "the receiver answered 410 Gone, and the webhook was disabled"
        )
        session.flush()
    return "pending" if row.state == "pending" else "failed"


def backoff_seconds(attempts: int) -> float:
    """How long to wait after the try with this number (1 is the first), with jitter."""
    base = BACKOFF_SECONDS[min(max(attempts, 1), len(BACKOFF_SECONDS)) - 1]
    return base * _random.uniform(1 - JITTER, 1 + JITTER)


def replay(session: Session, webhook_id: str, delivery_id: str, owner: str) -> WebhookDeliveryRow:
    """Send a message that has ended once more, with all tries; it keeps its id, by which receivers know it again.

    Raises:
        NotFound: no such webhook of this owner, or no such message of it.
        StateConflict: it still waits to be sent, or the webhook is disabled.
    """
    hook = webhooks.get_webhook(session, webhook_id, owner)
    statement = (
        select(WebhookDeliveryRow)
        .where(WebhookDeliveryRow.id == delivery_id, WebhookDeliveryRow.webhook_id == hook.id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    row = session.scalars(statement).one_or_none() if is_storable(delivery_id) else None
    if row is None:
        raise NotFound(f"{webhook_id} has no delivery {delivery_id!r}")
    webhooks.require_enabled(hook)
    if row.state == "pending":
        raise StateConflict(f"{delivery_id} still waits to be sent", hint="It is tried again by itself.")
    row.state, row.attempts, row.finished_at = "pending", 0, None
    row.available_at = database.now(session)
    session.flush()
    return row


def list_deliveries(
    session: Session,
    webhook_id: str,
    owner: str,
    state: str | None = None,
    cursor: str | None = None,
    limit: int = DEFAULT_LIMIT,
) -> Page[WebhookDeliveryRow]:
    """The messages of a webhook, newest first.

    Raises:
        NotFound: no such webhook of this owner.
        RequestInvalid: an unknown state, a bad cursor or limit.
    """
    hook = webhooks.get_webhook(session, webhook_id, owner)
    statement = select(WebhookDeliveryRow).where(WebhookDeliveryRow.webhook_id == hook.id)
    if state is not None:
        if state not in STATES:
            problem = f"must be one of {', '.join(STATES)}, not {state!r}"
            raise RequestInvalid(f"state {problem}", errors=[FieldError("/state", problem)])
        statement = statement.where(WebhookDeliveryRow.state == state)
    keys = (WebhookDeliveryRow.created_at, WebhookDeliveryRow.id)
    filters = {"webhook": hook.id, "state": state}
    fixed = [(WebhookDeliveryRow.webhook_id, hook.id)]
    return page_of(session, statement, keys, filters=filters, cursor=cursor, limit=limit, fixed=fixed)


def forget_deliveries(session: Session, older_than: timedelta = KEEP, limit: int = 1000) -> int:
    """Delete messages that have ended and are older than `older_than`, at most `limit`; returns how many."""
    oldest = database.now(session) - older_than
    # A UUIDv7 begins with its milliseconds: the primary key finds the old ones without looking at the others.
    first_kept = f"msg_{int(oldest.timestamp() * 1000):012x}"
    old: Sequence[str] = session.scalars(
        select(WebhookDeliveryRow.id)
        .where(WebhookDeliveryRow.id < first_kept, WebhookDeliveryRow.state != "pending")
        .order_by(WebhookDeliveryRow.id)
        .limit(limit)
    ).all()
    session.execute(
        delete(WebhookDeliveryRow)
        .where(WebhookDeliveryRow.id.in_(old), WebhookDeliveryRow.state != "pending")
        .execution_options(synchronize_session=False)
    )
    return len(old)


def _held(session: Session, sent: Dispatch) -> WebhookDeliveryRow | None:
    """The message's row, locked, while the sender of this try still holds it."""
    return session.scalars(
        select(WebhookDeliveryRow)
        .where(
            WebhookDeliveryRow.id == sent.id,
            _IS_PENDING,
            WebhookDeliveryRow.attempts == sent.attempt,
            WebhookDeliveryRow.available_at == sent.lease,
        )
        .with_for_update()
        .execution_options(populate_existing=True)
    ).one_or_none()


def _finish(row: WebhookDeliveryRow, state: str, status: int | None, error: str | None, moment: datetime) -> None:
    row.state, row.last_status, row.finished_at = state, status, moment
    row.last_error = None if error is None else _told(error)


def _told(error: str) -> str:
    """An error text as a column takes it: how a try went must be written down, whatever some library said of it."""
    return error[:_ERROR_LIMIT].encode("utf-8", "replace").decode("utf-8").replace("\x00", "?")
