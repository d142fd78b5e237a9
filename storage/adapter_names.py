"""The index of adapter names by their pieces of three characters: finds any part of a name (see migration 0003)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, cast, column, func, select, table, true
from sqlalchemy.dialects.postgresql import TSQUERY
from sqlalchemy.orm import Session

from storage.columns import UtcDateTime
from storage.pagination import Key, behind
from storage.tables import AdapterRow

GRAM = 3  # characters
MAX_GRAMS = 4  # of a query: more of them narrow no further
MAX_TERMS = 200
MAX_MATCHES = 2_000  # more are not sorted: a page of them is soon found in the list itself

LOOKED_AT = ("created_at", "id", "base_model", "model_id", "method", "name_folded")
"""What the filters of adapters look at."""
Condition = Callable[[Any], ColumnElement[bool]]

_names = table(
    "adapter_names", column("number"), column("adapter_id"), column("created_at", UtcDateTime()), column("name_folded")
)
_grams = table("adapter_name_grams", column("rowid"), column("adapter_name_grams"))
_terms = table("adapter_name_terms", column("term"))


def has_part(name: Any, part: str, *, sqlite: bool) -> ColumnElement[bool]:
    """Whether the folded name contains the folded text. Unlike LIKE it needs no escapes."""
    position = func.instr(name, part) if sqlite else func.strpos(name, part)
    return position > 0


def find_by_name(
    session: Session, part: str, after: Key | None, count: int, conditions: Sequence[Condition]
) -> list[Key] | None:
    """The newest `count` live adapters behind `after` whose folded name contains `part`.

    Args:
        part: folded, not empty.
        conditions: what else must hold; each is given what has the columns of LOOKED_AT.

    Returns:
        None when so many names match that looking through the list is quicker.
    """
    if session.get_bind().dialect.name == "sqlite":
        return _find_sqlite(session, part, after, count, conditions)
    quoted = [gram.replace("\\", "\\\\").replace("'", "''") for gram in _pieces(part)]
    query = " & ".join(f"'{gram}'" for gram in quoted) if len(part) >= GRAM else f"'{quoted[0]}':*"
    matching = select(*(getattr(AdapterRow, name) for name in LOOKED_AT)).where(
        AdapterRow.deleted_at.is_(None), func.rankwise_name_grams(AdapterRow.name_folded).op("@@")(cast(query, TSQUERY))
    )
    # One look into the index, whose lists are read whole: what it finds is counted first, and filtered only if few.
    found = matching.limit(MAX_MATCHES + 1).cte("found").prefix_with("MATERIALIZED", dialect="postgresql")
    total = select(func.count().label("total")).select_from(found).subquery()
    wanted = [has_part(found.c.name_folded, part, sqlite=False), *(check(found.c) for check in conditions)]
    if after is not None:
        wanted.append(behind(found.c.created_at, found.c.id, after))
    first = _first(select(found.c.created_at, found.c.id), found.c.created_at, found.c.id, count)
    rows = first.where(total.c.total <= MAX_MATCHES, *wanted).lateral()
    answer = session.execute(select(total.c.total, rows.c.created_at, rows.c.id).outerjoin_from(total, rows, true()))
    keys = [(number, moment, identifier) for number, moment, identifier in answer]
    if keys[0][0] > MAX_MATCHES:
        return None
    return [(moment, identifier) for _, moment, identifier in keys if identifier is not None]


def _find_sqlite(
    session: Session, part: str, after: Key | None, count: int, conditions: Sequence[Condition]
) -> list[Key] | None:
    if len(part) >= GRAM:
        grams: Sequence[str] = _pieces(part)
        operator = " AND "
    else:
        # terms have three characters, so these bounds enclose all that begin with the part
        begins = _terms.c.term.between(part, part + (GRAM - len(part)) * "\U0010ffff")
        grams = session.scalars(select(_terms.c.term).where(begins).limit(MAX_TERMS + 1)).all()
        operator = " OR "
        if len(grams) > MAX_TERMS:
            return None
        if not grams:
            return []
    query = operator.join('"' + gram.replace('"', '""') + '"' for gram in grams)
    matching = select(_grams.c.rowid).where(_grams.c.adapter_name_grams.op("MATCH")(query))
    if _exceeds(session, matching):
        return None
    statement = select(_names.c.created_at, _names.c.adapter_id).where(
        _names.c.number.in_(matching), has_part(_names.c.name_folded, part, sqlite=True)
    )
    if after is not None:
        statement = statement.where(behind(_names.c.created_at, _names.c.adapter_id, after))
    if conditions:
        statement = statement.where(
            select(1)
            .select_from(AdapterRow)
            .where(AdapterRow.id == _names.c.adapter_id, *(check(AdapterRow) for check in conditions))
            .exists()
        )
    return _keys(session, _first(statement, _names.c.created_at, _names.c.adapter_id, count))


def _exceeds(session: Session, matching: Select[*tuple[Any, ...]]) -> bool:
    rows = matching.limit(MAX_MATCHES + 1).subquery()
    return (session.scalar(select(func.count()).select_from(rows)) or 0) > MAX_MATCHES


def _pieces(part: str) -> list[str]:
    """Different pieces of three characters, spread over the text; the text itself if it is shorter."""
    pieces = list(dict.fromkeys(part[place : place + GRAM] for place in range(max(len(part) - GRAM + 1, 1))))
    step = -(-len(pieces) // MAX_GRAMS)
    return pieces[::step]


def _first(statement: Select[Any], created_at: Any, identifier: Any, count: int) -> Select[Any]:
    return statement.order_by(created_at.desc(), identifier.desc()).limit(count)


def _keys(session: Session, statement: Select[Any]) -> list[Key]:
    return [(moment, identifier) for moment, identifier in session.execute(statement)]
