"""How a base model goes out of use: it is deprecated, it waits for what depends on it, it is removed.

Both dates may lie ahead. Whichever server first sees that one has come, by the database's clock, does what is due, in
one transaction that locks the model: each event is published once, and nothing that depends on a model outlives it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from artifacts.errors import FieldError, RequestInvalid, StateConflict
from storage import database, models
from storage.dependents import Dependents, dependents_of
from storage.domain_events import publish
from storage.tables import ModelRow
from storage.text import storable

REASON_LIMIT = 2000


class Unchanged(Enum):
    """The default of a field that an update leaves as it is, since None means to clear it."""

    UNCHANGED = "unchanged"


Date = datetime | Unchanged | None


@dataclass(frozen=True, slots=True)
class Retirement:
    """How a model goes.

    Attributes:
        deprecate_at: None: as it is, if it is deprecated by now; else now.
        remove_at: None: not by itself.
        successor: id or name of the model to use instead.
    """

    deprecate_at: datetime | None = None
    remove_at: datetime | None = None
    successor: str | None = None
    reason: str | None = None


def deprecate(session: Session, model_id: str, plan: Retirement) -> ModelRow:
    """Deprecate a model, from a date on. A second time replaces the plan; the event of a date that has come stays one.

    Raises:
        NotFound
        StateConflict: it was removed.
        RequestInvalid: a removal before the deprecation, or a successor that is not there or the model itself.
    """
    row = models.lock_model(session, model_id)
    moment = database.now(session)
    if row.removed_at is not None:
        raise StateConflict(f"the base model {row.name!r} was removed on {row.removed_at:%Y-%m-%d}")
    begun = row.deprecated_at is not None and row.deprecated_at <= moment
    row.deprecated_at = plan.deprecate_at or (row.deprecated_at if begun else moment)
    row.remove_at = plan.remove_at
    if row.remove_at is not None and row.deprecated_at is not None and row.remove_at < row.deprecated_at:
        raise _invalid("/remove_at", f"lies before the deprecation at {row.deprecated_at.isoformat()}")
    row.successor_id = None if plan.successor is None else _successor(session, row, plan.successor)
    row.deprecation_reason = None if plan.reason is None else storable(plan.reason, "/reason", REASON_LIMIT)
    _settle(session, row, moment)
    return row


def update_model(
    session: Session,
    model_id: str,
    *,
    deprecated_at: Date = Unchanged.UNCHANGED,
    remove_at: Date = Unchanged.UNCHANGED,
    removed_at: Date = Unchanged.UNCHANGED,
) -> ModelRow:
    """Set or clear (None) single dates. A `removed_at` that lies ahead is a plan, and so the same as `remove_at`.

    With None for `removed_at` a removed model is there again.

    Raises:
        NotFound
        StateConflict: it is to be removed, and something depends on it.
    """
    row = models.lock_model(session, model_id)
    moment = database.now(session)
    if not isinstance(deprecated_at, Unchanged):
        row.deprecated_at = deprecated_at
        if deprecated_at is None:
            row.deprecation_told_at = row.deprecation_reason = row.successor_id = None
    if not isinstance(remove_at, Unchanged):
        row.remove_at = remove_at
    if not isinstance(removed_at, Unchanged):
        if removed_at is None:
            row.removed_at = row.remove_at = None
        elif removed_at > moment:
            row.removed_at, row.remove_at = None, removed_at
        elif row.removed_at is None:
            _remove(session, row, removed_at)
    _settle(session, row, moment)
    return row


def remove_model(session: Session, model_id: str) -> ModelRow:
    """Remove a model now: no job can name it any more, and its row stays. One that was removed stays so.

    Raises:
        NotFound
        StateConflict: something depends on it; the first of that are listed, and all are counted.
    """
    row = models.lock_model(session, model_id)
    if row.removed_at is None:
        _remove(session, row, database.now(session))
    return row


def is_due(session: Session, moment: datetime | None = None) -> list[str]:
    """Ids of the models one of whose dates has come and has not had its effect."""
    moment = moment or database.now(session)
    due = or_(
        (ModelRow.deprecated_at <= moment) & ModelRow.deprecation_told_at.is_(None),
        (ModelRow.remove_at <= moment) & ModelRow.removed_at.is_(None),
    )
    return list(session.scalars(select(ModelRow.id).where(due).order_by(ModelRow.created_at, ModelRow.id)))


def advance(session: Session, model_id: str, *, moment: datetime | None = None) -> list[str]:
    """Do what is due for one model: publish that it is deprecated; remove it, if nothing depends on it any more.

    Returns:
        What was done, "deprecated" or "removed"; another server may have done it before.
    """
    row = models.lock_model(session, model_id)
    moment = moment or database.now(session)
    done = ["deprecated"] if _settle(session, row, moment) else []
    due = row.removed_at is None and row.remove_at is not None and row.remove_at <= moment
    if due and not dependents_of(session, row):
        _mark_removed(session, row, moment)
        done.append("removed")
    return done


def warnings_of(session: Session, model_ids: Collection[str]) -> list[str]:
    """A sentence for each of these models that is deprecated by now."""
    if not model_ids:
        return []
    moment = database.now(session)
    statement = select(ModelRow).where(ModelRow.id.in_(model_ids), ModelRow.deprecated_at <= moment)
    return [warning(session, row) for row in session.scalars(statement.order_by(ModelRow.id))]


def warning(session: Session, row: ModelRow) -> str:
    """What to tell of a deprecated model, for people."""
    parts = [f"The base model {row.name!r} is deprecated since {row.deprecated_at:%Y-%m-%d}"]
    if row.removed_at is not None:
        parts.append(f" and was removed on {row.removed_at:%Y-%m-%d}")
    elif row.remove_at is not None:
        parts.append(f" and is to be removed on {row.remove_at:%Y-%m-%d}")
    if row.deprecation_reason:
        parts.append(f": {row.deprecation_reason.rstrip('.')}")
    parts.append(".")
    successor = None if row.successor_id is None else session.get(ModelRow, row.successor_id)
    if successor is not None:
        parts.append(f" Use {successor.name!r} instead.")
    return "".join(parts)


def _settle(session: Session, row: ModelRow, moment: datetime) -> bool:
    """Publish that the model is deprecated, once its date has come; whether that was done now."""
    session.flush()
    if row.deprecated_at is None or row.deprecated_at > moment or row.deprecation_told_at is not None:
        return False
    data: dict[str, Any] = {"name": row.name, "deprecated_at": row.deprecated_at.isoformat()}
    if row.remove_at is not None:
        data["remove_at"] = row.remove_at.isoformat()
    if row.successor_id is not None:
        data["successor"] = row.successor_id
    publish(session, "base_model.deprecated", row.id, data)
    row.deprecation_told_at = moment
    session.flush()
    return True


def _remove(session: Session, row: ModelRow, moment: datetime) -> None:
    found = dependents_of(session, row)
    if found:
        raise blocked(row, found)
    _mark_removed(session, row, moment)


def blocked(row: ModelRow, found: Dependents) -> StateConflict:
    """The refusal of a removal."""
    return StateConflict(
        f"the base model {row.name!r} is still needed: {found.words()} depend on it",
        hint="Transfer its adapters, waive them (PUT /adapters/{id}/waiver) or delete them; wait for its jobs, or "
        "cancel them; disable its schedules; switch its aliases.",
        errors=[FieldError(f"/{item.collection}/{item.id}", item.reason) for item in found.first],
    )


def _mark_removed(session: Session, row: ModelRow, moment: datetime) -> None:
    row.removed_at = moment
    publish(session, "base_model.removed", row.id, {"name": row.name, "removed_at": moment.isoformat()})
    session.flush()


def _successor(session: Session, row: ModelRow, name: str) -> str:
    found = models.find_model(session, name)
    if found is None:
        raise _invalid("/successor", f"there is no base model {name[:300]!r}")
    if found.id == row.id:
        raise _invalid("/successor", "is the model itself")
    if found.removed_at is not None:
        raise _invalid("/successor", f"the base model {found.name!r} was removed on {found.removed_at:%Y-%m-%d}")
    return found.id


def _invalid(pointer: str, problem: str) -> RequestInvalid:
    return RequestInvalid(f"{pointer} {problem}", errors=[FieldError(pointer, problem)])
