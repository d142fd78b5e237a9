"""The filters of the list of adapters against a plain look at every adapter, whichever index leads."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
from sqlalchemy import select

from artifacts.errors import RequestInvalid
from artifacts.manifest import AdapterManifest, FileEntry
from storage import adapter_search, adapters, migrations
from storage.adapters import AdapterFilter
from storage.database import Database
from storage.tables import AdapterFileRow, AdapterRow, AdapterTagRow

Make = Callable[..., AdapterManifest]
SHARED = FileEntry("adapter_config.json", "c0" * 32, 20, "application/json")
NAMES = ("Amber Castle", "amber-noir", "100% \"quoted\" 'name'", "back\\slash & co", "ЖЁЛТЫЙ кот", "Straße", "a", "ab")


def found(database: Database, limit: int = 200, **filters: str) -> list[str]:
    """The ids of all pages."""
    ids: list[str] = []
    cursor: str | None = None
    with database.read() as session:
        while True:
            page = adapters.list_adapters(session, AdapterFilter(**filters), cursor, limit)
            ids += [row.id for row in page.items]
            cursor = page.next
            if cursor is None:
                return ids


@pytest.fixture
def rows(database: Database, make_manifest: Make) -> list[AdapterRow]:
    """Sixty adapters, newest first, of which some were deleted; most share a file."""
    choice = random.Random(7)
    made = []
    for number in range(60):
        base = choice.choice(["org/one", "org/two", None])
        manifest = make_manifest(str(number), method=choice.choice(["lora", "lora", "dora"]), base_model=base)
        if choice.random() < 0.8:
            again = FileEntry("copy.json", SHARED.sha256, 20, "application/json")
            manifest = make_manifest(
                str(number),
                method=manifest.method,
                base_model=base,
                files=(SHARED, again, manifest.files[1]),
                weights_digest=f"{number % 3:064x}",
            )
        tags = choice.sample(["x", "y", "z"], choice.randrange(4))
        with database.write() as session:
            made.append(adapters.add_adapter(session, manifest, name=f"{choice.choice(NAMES)} {number}", tags=tags)[0])
    for row in made[::7]:
        with database.write() as session:
            adapters.delete_adapter(session, row.id)
    return [row for number, row in enumerate(made) if number % 7][::-1]


def matches(row: AdapterRow, **filters: str) -> bool:
    digests = {row.weights_digest, *(file.sha256 for file in row.files)}
    prefixes = {file.sha256[:10] for file in row.files}
    checks: dict[str, Callable[[str], bool]] = {
        "base_model": lambda value: row.base_model == value,
        "method": lambda value: row.method == value,
        "tag": lambda value: value in row.tags,
        "name": lambda value: value.casefold() in row.name.casefold(),
        "sha256": lambda value: value in digests or value in prefixes,
    }
    return all(checks[name](value) for name, value in filters.items())


VALUES = {
    "base_model": ["org/one", "org/none"],
    "method": ["dora", "lora"],
    "tag": ["x", "none"],
    "name": ["amber", "a", "ab", "AR C", '"q', "' n", "\\s", "& c", "%", "ж", "лт", "кот 1", "SS", "zz", "0"],
    "sha256": ["c0" * 32, "c0" * 5, f"{1:064x}", "ff" * 32],
}


def combinations() -> Iterator[dict[str, str]]:
    for name, values in VALUES.items():
        yield from ({name: value} for value in values)
    choice = random.Random(3)
    for _ in range(60):
        names = choice.sample(sorted(VALUES), choice.randrange(2, 6))
        yield {name: choice.choice(VALUES[name]) for name in names}


# with small numbers every road is taken: another index leads, the window ends, too many names match
@pytest.mark.parametrize(("probe", "window", "most"), [(10_000, 30_000, 2_000), (5, 3, 2_000), (5, 3, 2), (100, 0, 0)])
def test_filters_find_what_a_look_at_every_adapter_finds(
    database: Database, rows: list[AdapterRow], monkeypatch: pytest.MonkeyPatch, probe: int, window: int, most: int
) -> None:
    monkeypatch.setattr("storage.adapter_search.PROBE_ROWS", probe)
    monkeypatch.setattr("storage.adapter_search.WINDOW_ROWS", window)
    monkeypatch.setattr("storage.adapter_search.SAMPLE_ROWS", window // 2)
    monkeypatch.setattr("storage.adapter_names.MAX_MATCHES", most)
    monkeypatch.setattr("storage.adapter_names.MAX_TERMS", most)
    for filters in combinations():
        expected = [row.id for row in rows if matches(row, **filters)]
        assert found(database, **filters) == expected, filters
        assert found(database, limit=3, **filters) == expected, filters


def test_every_filter_is_tried(rows: list[AdapterRow]) -> None:
    """The values above find some adapters, and not all: else the test before would show little."""
    for name, values in VALUES.items():
        numbers = [sum(matches(row, **{name: value}) for row in rows) for value in values]
        assert 0 in numbers or name == "method"
        assert any(0 < number < len(rows) for number in numbers)


def test_a_digest_that_can_not_be_one_is_refused_with_other_filters_too(database: Database) -> None:
    with pytest.raises(RequestInvalid, match="AutoV2"):
        found(database, sha256="xyz", tag="x")


def test_tags_go_with_the_adapter(database: Database, make_manifest: Make) -> None:
    with database.write() as session:
        row, _ = adapters.add_adapter(session, make_manifest(), name="n", tags=["a", "b", "a"])
    with database.read() as session:
        stored = session.scalars(select(AdapterTagRow).order_by(AdapterTagRow.tag)).all()
        assert [(tag.tag, tag.adapter_id, tag.created_at) for tag in stored] == [
            ("a", row.id, row.created_at),
            ("b", row.id, row.created_at),
        ]
        assert {file.created_at for file in session.scalars(select(AdapterFileRow))} == {row.created_at}
    with database.write() as session:
        adapters.delete_adapter(session, row.id)
    with database.read() as session:
        assert session.scalars(select(AdapterTagRow)).all() == []


def test_the_longest_texts_fit_into_every_index(database: Database, make_manifest: Make) -> None:
    choice = random.Random(0)

    def text(length: int) -> str:
        return "".join(chr(choice.randrange(0x1F300, 0x1F9FF)) for _ in range(length))

    manifest = make_manifest(method=text(40), base_model=text(300))
    with database.write() as session:
        row, _ = adapters.add_adapter(session, manifest, name=text(200), tags=[text(200)])
    assert found(database, name=row.name[50:60]) == found(database, tag=row.tags[0]) == [row.id]
    with pytest.raises(RequestInvalid, match="/tags/0"), database.write() as session:
        adapters.add_adapter(session, make_manifest("b"), name="b", tags=["x" * 201])


def test_a_page_leaves_out_what_is_deleted_meanwhile(
    database: Database, make_manifest: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL shows each statement what has been committed until then: a key may have lost its row."""
    with database.write() as session:
        kept, _ = adapters.add_adapter(session, make_manifest("1"), name="kept")
    gone = (kept.created_at, "adp_" + "f" * 32)
    kept_key = (kept.created_at, kept.id)
    monkeypatch.setattr(adapter_search._Search, "keys", lambda *_: [gone, kept_key])
    assert found(database) == [kept.id]


def test_the_migration_fills_the_indexes(database: Database, make_manifest: Make) -> None:
    """Down to the tables of before and up again: what was there is found as before."""
    ids: dict[str, Any] = {}
    for name in ("first live", "then deleted"):
        with database.write() as session:
            ids[name] = adapters.add_adapter(session, make_manifest(name), name=name, tags=["t"])[0]
    with database.write() as session:
        adapters.delete_adapter(session, ids["then deleted"].id)
    migrations.downgrade(database, "0002")
    migrations.upgrade(database)
    live = ids["first live"]
    for filters in (AdapterFilter(name="RST"), AdapterFilter(tag="t"), AdapterFilter(sha256=live.files[0].sha256)):
        assert found(database, **{k: v for k, v in asdict(filters).items() if v is not None}) == [live.id]
    assert found(database, name="deleted") == []
    with database.read() as session:
        files = session.scalars(select(AdapterFileRow).where(AdapterFileRow.adapter_id == live.id)).all()
    assert {file.created_at for file in files} == {live.created_at}


def test_a_name_is_forgotten_with_its_row(database: Database, make_manifest: Make) -> None:
    with database.write() as session:
        row, _ = adapters.add_adapter(session, make_manifest(), name="Watercolor")
    assert found(database, name="terco") == [row.id]
    with database.write() as session:
        session.get_one(AdapterRow, row.id).name_folded = "renamed"
    assert found(database, name="terco") == []
    assert found(database, name="ename") == [row.id]
    with database.write() as session:
        adapters.delete_adapter(session, row.id)
    assert found(database, name="ename") == []
    if database.is_sqlite:
        with database.engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM adapter_names").scalar() == 0
            assert connection.exec_driver_sql("SELECT count(*) FROM adapter_name_terms").scalar() == 0
