"""Keyset pages, newest first: the cursor names the last row seen, so that new rows shift nothing."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Select, SQLColumnExpression, literal, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from artifacts.errors import FieldError, RequestInvalid
from storage.columns import UtcDateTime
from storage.text import is_storable

MAX_LIMIT = 200
DEFAULT_LIMIT = 50

Row = TypeVar("Row")
Key = tuple[datetime, str]
"""When a row was created, and its id: rows are listed by it, descending."""


@dataclass(frozen=True, slots=True)
class Page(Generic[Row]):
    """One page and the cursor of the next one; None on the last."""

    items: tuple[Row, ...]
    next: str | None


def page_of(
    session: Session,
    statement: Select[Row],
    keys: tuple[InstrumentedAttribute[datetime], InstrumentedAttribute[str]],
    *,
    filters: Mapping[str, Any],
    cursor: str | None,
    limit: int,
    fixed: Sequence[tuple[InstrumentedAttribute[Any], Any]] = (),
) -> Page[Row]:
    """The page of `statement` after `cursor`, by (created_at, id) descending.

    Args:
        keys: the columns created_at and id.
        fixed: see `in_order`.
        filters: what `statement` was filtered by; a cursor is good only for the same filters.
        limit: rows on the page, 1 to 200.

    Raises:
        RequestInvalid: the limit is out of range, or the cursor is not one of ours or of another query.
    """
    created_at, identifier = keys
    start = start_of(cursor, limit, filters)
    ordered = in_order(statement, (created_at, identifier), start, fixed=fixed)
    rows: Sequence[Row] = session.scalars(ordered.limit(limit + 1)).all()
    items = tuple(rows[:limit])
    if len(rows) <= limit:
        return Page(items, None)
    return Page(items, cursor_at((getattr(items[-1], created_at.key), getattr(items[-1], identifier.key)), filters))


def start_of(cursor: str | None, limit: int, filters: Mapping[str, Any]) -> Key | None:
    """The key of the last row that the reader has seen; None at the start of the list.

    Raises:
        RequestInvalid: as for `page_of`.
    """
    if not 1 <= limit <= MAX_LIMIT:
        raise _invalid("limit", f"must be between 1 and {MAX_LIMIT}, not {limit}")
    return None if cursor is None else _decode(cursor, filters)


def in_order(
    statement: Any,
    keys: tuple[SQLColumnExpression[datetime], SQLColumnExpression[str]],
    after: Key | None,
    last: Key | None = None,
    *,
    fixed: Sequence[tuple[InstrumentedAttribute[Any], Any]] = (),
) -> Any:
    """`statement` by (created_at, id) descending, from behind `after`, up to and with `last`.

    Both bounds are comparisons of rows, whose place both databases seek in an index.

    Args:
        fixed: columns and the values that they have in all rows of the list: those that an index has before
            created_at and id. As parts of the bounds and of the order they leave PostgreSQL no other index: with a
            plain condition it may walk through the whole table in the order of the list, expecting what it looks for
            to be spread evenly, and find it at the far end.
    """
    leading = tuple(column for column, _ in fixed)
    values = tuple(literal(value, column.type) for column, value in fixed)
    if after is not None:
        statement = statement.where(_row(leading + keys) < _row(values + _literals(after)))
    elif fixed:
        statement = statement.where(_row(leading) <= _row(values))
    if last is not None:
        statement = statement.where(_row(leading + keys) >= _row(values + _literals(last)))
    elif fixed:
        statement = statement.where(_row(leading) >= _row(values))
    return statement.order_by(*(column.desc() for column in leading + keys))


def behind(
    created_at: SQLColumnExpression[datetime], identifier: SQLColumnExpression[str], key: Key
) -> ColumnElement[bool]:
    """The rows that come after `key`."""
    condition: ColumnElement[bool] = _row((created_at, identifier)) < _row(_literals(key))
    return condition


def _row(columns: Sequence[Any]) -> Any:
    return columns[0] if len(columns) == 1 else tuple_(*columns)


def _literals(key: Key) -> tuple[Any, Any]:
    moment, identifier = key
    return literal(moment, UtcDateTime()), literal(identifier)


def cursor_at(key: Key, filters: Mapping[str, Any]) -> str:
    """The cursor of the page that begins behind the row `key`."""
    moment, identifier = key
    return _encode(moment, identifier, filters)


def _encode(moment: datetime, identifier: str, filters: Mapping[str, Any]) -> str:
    document = json.dumps([moment.isoformat(), identifier, _digest(filters)], separators=(",", ":"))
    return base64.urlsafe_b64encode(document.encode()).rstrip(b"=").decode()


def _decode(cursor: str, filters: Mapping[str, Any]) -> tuple[datetime, str]:
    try:
        raw = base64.b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        stamp, identifier, digest = json.loads(raw)
        moment = datetime.fromisoformat(stamp)
        if not isinstance(identifier, str) or not is_storable(identifier) or moment.tzinfo is None:
            raise ValueError("not the fields of a cursor")
        moment = moment.astimezone(UTC)
    except (ValueError, TypeError, OverflowError, binascii.Error, RecursionError) as error:
        raise _invalid("cursor", "is not a cursor of this service") from error
    if digest != _digest(filters):
        raise _invalid("cursor", "belongs to a list with other filters")
    return moment, identifier


def _digest(filters: Mapping[str, Any]) -> str:
    """A short digest of the filters, in any order."""
    return hashlib.sha256(json.dumps(dict(filters), sort_keys=True, default=str).encode()).hexdigest()[:16]


def _invalid(name: str, problem: str) -> RequestInvalid:
    return RequestInvalid(
        f"{name} {problem}",
        hint="Start again without a cursor." if name == "cursor" else None,
        errors=[FieldError(f"/{name}", problem)],
    )
