"""Lists of adapters and their filters.

A page is made in two steps: the keys of its rows (when they were created, and their ids) from one index that has
them in the order of the list, then the rows themselves. Each filter has such an index. With several filters the one
that is the quickest to look through leads, and the others are checked row by row, where the index leads to: most in
the index of adapters itself, or in the narrow table of tags.

How long a page takes depends on the rows that the leading index gives before the page is full. That is bounded for
each filter alone, whatever the number of adapters. It is not for several filters that each hold for very many
adapters and hardly ever together, nor for a part of a name that very many adapters have, but none of the newer ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, func, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased, defer

from artifacts.errors import FieldError, RequestInvalid
from storage.adapter_names import GRAM, Condition, find_by_name, has_part
from storage.ids import is_id
from storage.pagination import DEFAULT_LIMIT, Key, Page, cursor_at, in_order, start_of
from storage.tables import AdapterFileRow, AdapterRow, AdapterTagRow
from storage.text import fold, is_storable, short_digest

AUTOV2_LENGTH = 10  # civitai's AutoV2: so many of the first hex digits of the file's SHA-256
PROBE_ROWS = 1_000  # an index with more rows than this is not counted any further
WINDOW_ROWS = 30_000  # how far down the list a part of a name is looked for before the index of names is asked
SAMPLE_ROWS = 3_000  # how far, if those rows show that the window would not fill the page
COMMON_SHARE = 100  # one row of so many has the part of a name: then its index has too many matches to be of use
FETCH_COST = 10  # what it costs to look a row up in its table, in rows of an index that is read in order

_LIVE = AdapterRow.deleted_at.is_(None)


@dataclass(frozen=True, slots=True)
class AdapterFilter:
    """Which adapters to list; None does not filter.

    Attributes:
        base_model: name of the base model as the adapter gives it, or the id (mdl_…) of a registered one.
        method: e.g. "lora".
        tag: one of its tags, exactly.
        name: part of its name, whatever the case.
        sha256: of any of its files, or its weights digest: 64 hex digits; or AutoV2: the first 10 of a file's.
    """

    base_model: str | None = None
    method: str | None = None
    tag: str | None = None
    name: str | None = None
    sha256: str | None = None


def list_adapters(
    session: Session, filters: AdapterFilter | None = None, cursor: str | None = None, limit: int = DEFAULT_LIMIT
) -> Page[AdapterRow]:
    """The adapters that are not deleted, newest first. Their `modules` are not loaded: reading them raises.

    Raises:
        RequestInvalid: `sha256` is not 10 or 64 hex digits; a bad cursor or limit.
    """
    chosen = filters or AdapterFilter()
    after = start_of(cursor, limit, asdict(chosen))
    keys = _Search(session, chosen).keys(after, limit + 1)
    following = cursor_at(keys[limit - 1], asdict(chosen)) if len(keys) > limit else None
    wanted = [identifier for _, identifier in keys[:limit]]
    statement = select(AdapterRow).where(AdapterRow.id.in_(wanted), _LIVE)
    rows = session.scalars(statement.options(defer(AdapterRow.modules, raiseload=True))) if wanted else ()
    found = {row.id: row for row in rows}
    return Page(tuple(found[identifier] for identifier in wanted if identifier in found), following)


Source = type[AdapterRow] | type[AdapterTagRow]


@dataclass(frozen=True, slots=True)
class _Stream:
    """Rows of one index, in the order of the list."""

    created_at: InstrumentedAttribute[Any]
    id: InstrumentedAttribute[str]
    fixed: tuple[tuple[InstrumentedAttribute[Any], str], ...] = ()

    @property
    def source(self) -> Source | None:
        """The table whose rows have what the other filters look at."""
        if self.id is AdapterRow.id:
            return AdapterRow
        return AdapterTagRow if self.id is AdapterTagRow.adapter_id else None

    @property
    def is_of_adapters(self) -> bool:
        return self.source is AdapterRow

    @property
    def of_files(self) -> bool:
        """An adapter may have two files of one content; and a deleted one still has its files."""
        return self.id is AdapterFileRow.adapter_id

    def select(self, after: Key | None, last: Key | None = None) -> Select[Any]:
        """Keys behind `after`, up to and with `last`."""
        statement = select(self.created_at, self.id)
        if self.is_of_adapters:
            statement = statement.where(_LIVE)
        ordered: Select[Any] = in_order(statement, (self.created_at, self.id), after, last, fixed=self.fixed)
        return ordered


class _Search:
    """The keys of the adapters that the filters leave."""

    def __init__(self, session: Session, filters: AdapterFilter) -> None:
        self._session = session
        self._sqlite = session.get_bind().dialect.name == "sqlite"
        self._name = fold(filters.name) if filters.name else None
        self._impossible = not all(value is None or is_storable(value) for value in asdict(filters).values())
        self._streams: dict[str, tuple[_Stream, ...]] = {}  # filter → the indexes that have its adapters
        self._conditions: dict[str, Condition] = {}  # filter → how it is checked on a row
        if not self._impossible:
            self._use(filters)

    def _use(self, filters: AdapterFilter) -> None:
        if filters.sha256 is not None:
            self._use_digest(filters.sha256.lower())
        if filters.tag is not None:
            tag = ((AdapterTagRow.tag, filters.tag),)
            self._streams["tag"] = (_Stream(AdapterTagRow.created_at, AdapterTagRow.adapter_id, tag),)
            self._conditions["tag"] = lambda source: _there_is(
                AdapterTagRow.adapter_id,
                AdapterTagRow.tag == filters.tag,
                AdapterTagRow.created_at == source.created_at,
                AdapterTagRow.adapter_id == source.id,
            )
        if filters.base_model is not None:
            column = "model_id" if is_id(filters.base_model, "mdl") else "base_model"
            self._equals("base_model", column, filters.base_model)
        if filters.method is not None:
            self._equals("method", "method", filters.method)
        if self._name is not None:
            part = self._name
            self._conditions["name"] = lambda source: has_part(source.name_folded, part, sqlite=self._sqlite)

    def _equals(self, name: str, column: str, value: str) -> None:
        of_adapters: InstrumentedAttribute[Any] = getattr(AdapterRow, column)
        self._streams[name] = (_Stream(AdapterRow.created_at, AdapterRow.id, ((of_adapters, value),)),)

        def check(source: Any) -> ColumnElement[bool]:
            if source is AdapterTagRow and column == "base_model":
                return AdapterTagRow.base_model_digest == short_digest(value)
            found = getattr(source, column)
            # the appended nothing hides the column from SQLite's choice of an index: the leading one is chosen here
            equal: ColumnElement[bool] = (found + "" if self._sqlite else found) == value
            return equal

        self._conditions[name] = check

    def _use_digest(self, digest: str) -> None:
        streams: tuple[_Stream, ...] = ()
        weights: str | None = None
        if re.fullmatch(r"[0-9a-f]{64}", digest):
            files, weights = [digest], digest
            streams = (_Stream(AdapterRow.created_at, AdapterRow.id, ((AdapterRow.weights_digest, digest),)),)
        elif re.fullmatch(rf"[0-9a-f]{{{AUTOV2_LENGTH}}}", digest):
            files = list(self._digests_that_begin(digest))
        else:
            problem = f"must be 64 hex digits, or the first {AUTOV2_LENGTH} (AutoV2), not {digest!r}"
            raise RequestInvalid(f"sha256 {problem}", errors=[FieldError("/sha256", problem)])
        self._streams["sha256"] = (*streams, *(_of_file(found) for found in files))
        self._conditions["sha256"] = lambda source: _has_content(source, files, weights)

    def _digests_that_begin(self, prefix: str) -> Iterable[str]:
        """Digests of files, one step in their index each; forty bits are rarely shared by two."""
        column = AdapterFileRow.sha256
        found = self._session.scalar(select(func.min(column)).where(column >= prefix, column < prefix + "g"))
        while found is not None:
            yield found
            found = self._session.scalar(select(func.min(column)).where(column > found, column < prefix + "g"))

    def keys(self, after: Key | None, count: int) -> list[Key]:
        """The newest `count` behind `after`."""
        if self._impossible:
            return []
        leading = self._leading(after)
        streams = self._streams.get(leading, (_Stream(AdapterRow.created_at, AdapterRow.id),))
        others = [condition for name, condition in self._conditions.items() if name != leading]
        if self._name is None or leading == "sha256":
            return self._walk(streams, others, after, count)
        return self._walk_names(streams[0], others, after, count)

    def _leading(self, after: Key | None) -> str:
        """The name of the filter whose rows behind `after` are the quickest to look through."""
        if len(self._streams) < 2:
            return next(iter(self._streams), "")
        costs = {name: sum(self._cost(stream, after) for stream in found) for name, found in self._streams.items()}
        return min(costs, key=lambda name: costs[name])

    def _cost(self, stream: _Stream, after: Key | None) -> int:
        rows = stream.select(after).limit(PROBE_ROWS).subquery()
        count = self._session.scalar(select(func.count()).select_from(rows)) or 0
        return count if stream.source is not None else count * FETCH_COST

    def _walk_names(self, stream: _Stream, conditions: Sequence[Condition], after: Key | None, count: int) -> list[Key]:
        """A common part of a name soon fills a page from the top of the list; a rare one is found in its index."""
        assert self._name is not None
        keys: list[Key] = []
        start = after
        # SQLite gives the matches of three characters and more one by one: there the index soon tells which it is
        if not self._sqlite or len(self._name) < GRAM:
            for rows, promising in ((SAMPLE_ROWS, 0), (WINDOW_ROWS, count * SAMPLE_ROWS)):
                if len(keys) * WINDOW_ROWS < promising:
                    break
                bottom = self._session.execute(stream.select(after).offset(rows).limit(1)).first()
                last = None if bottom is None else (bottom[0], bottom[1])
                keys += self._walk([stream], conditions, after, count - len(keys), last)
                if last is None or len(keys) == count:
                    return keys
                after = last
            if len(conditions) > 1 and self._is_common(stream, start):
                return keys + self._walk([stream], conditions, after, count - len(keys))
        others = [condition for name, condition in self._conditions.items() if name != "name"]
        found = find_by_name(self._session, self._name, after, count - len(keys), others)
        return keys + (self._walk([stream], conditions, after, count - len(keys)) if found is None else found)

    def _is_common(self, stream: _Stream, after: Key | None) -> bool:
        """Whether so many rows have the part of the name that its index would not be used in the end."""
        assert stream.source is not None
        name = stream.source.name_folded
        sample = stream.select(after).add_columns(name).limit(SAMPLE_ROWS).subquery()
        matching = select(func.count()).where(has_part(sample.c.name_folded, self._name or "", sqlite=self._sqlite))
        return (self._session.scalar(matching) or 0) * COMMON_SHARE > SAMPLE_ROWS

    def _walk(
        self,
        streams: Sequence[_Stream],
        conditions: Sequence[Condition],
        after: Key | None,
        count: int,
        last: Key | None = None,
    ) -> list[Key]:
        """Look through the streams until `count` rows are found, or as far as `last`."""
        found: set[Key] = set()
        for stream in streams:
            statement = stream.select(after, last)
            if stream.of_files:
                statement = statement.add_columns(
                    AdapterFileRow.sha256
                ).distinct()  # the order of the index, so no sort
            if stream.source is not None:
                statement = statement.where(*(check(stream.source) for check in conditions))
            else:
                checks = (check(AdapterRow) for check in conditions)
                statement = statement.where(_there_is(AdapterRow.id, AdapterRow.id == stream.id, _LIVE, *checks))
            rows = self._session.execute(statement.limit(count))
            found.update((row[0], row[1]) for row in rows)
        return sorted(found, reverse=True)[:count]


def _has_content(source: Any, files: Sequence[str], weights: str | None) -> ColumnElement[bool]:
    """Whether the adapter of a row has one of the files, or the weights."""
    identifier = AdapterTagRow.adapter_id if source is AdapterTagRow else source.id
    has_file = _there_is(
        AdapterFileRow.adapter_id,
        AdapterFileRow.sha256.in_(files),
        AdapterFileRow.created_at == source.created_at,
        AdapterFileRow.adapter_id == identifier,
    )
    if weights is None:
        return has_file
    again = aliased(AdapterRow)  # looked up, so that the leading index is read without its table
    return or_(has_file, _there_is(again.id, again.id == identifier, again.weights_digest == weights))


def _there_is(column: InstrumentedAttribute[str], *conditions: ColumnElement[bool]) -> ColumnElement[bool]:
    """Whether there is such a row, looked up for each row of the outer query in turn.

    The same as EXISTS, which PostgreSQL may turn into a join of all rows, although a page needs few.
    """
    return select(column).where(*conditions).limit(1).scalar_subquery().is_not(None)


def _of_file(digest: str) -> _Stream:
    return _Stream(AdapterFileRow.created_at, AdapterFileRow.adapter_id, ((AdapterFileRow.sha256, digest),))
