"""How the databases find the rows of every list, and of a claim: by an index, whatever the number of rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from benchmarks import pool_rows
from storage import adapters, claims, jobs, models
from storage.adapters import AdapterFilter
from storage.claims import SlotOffer
from storage.database import Database
from storage.jobs import JobFilter
from storage.pagination import cursor_at
from storage.tables import AdapterRow, JobRow

SIZES = pool_rows.Sizes(adapters=12_000, finished_jobs=12_000, queued_jobs=2_000)
LARGE = ("adapters", "adapter_files", "adapter_tags", "adapter_names", "jobs", "job_attempts", "job_events")
Call = Callable[[Session], Any]


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """Enough rows, and the statistics of them, for PostgreSQL to have a reason to use an index."""
    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path_factory.mktemp('plans') / 'rankwise.db'}")
    else:
        server = request.getfixturevalue("postgres_server")
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute("CREATE DATABASE plans")
        database = Database(server.get_uri(database="plans"))
    database.upgrade()
    pool_rows.load(database, SIZES)
    yield database
    database.dispose()


@contextmanager
def recorded(database: Database) -> Iterator[list[tuple[str, Any]]]:
    """The statements that are sent to the database, with their parameters."""
    sent: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if re.match(r"(SELECT|UPDATE|WITH|INSERT)\b", statement):
            sent.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(database.engine, "before_cursor_execute", note)


def plans(database: Database, call: Call) -> list[str]:
    """The plan of each statement that `call` sends, one line a step."""
    with recorded(database) as sent, database.write() as session:
        call(session)
        session.rollback()
    explain = "EXPLAIN QUERY PLAN " if database.is_sqlite else "EXPLAIN "
    found = []
    with database.engine.connect() as connection:
        for statement, parameters in sent:
            lines = connection.exec_driver_sql(explain + statement, parameters).fetchall()
            found.append("\n".join(str(line[-1]) for line in lines))
    return found


def full_scans(plan: str) -> list[str]:
    """Steps that read a large table from end to end, and not by an index in the order of the list."""
    tables = "|".join(LARGE)
    return [
        line.strip()
        for line in plan.splitlines()
        if re.search(rf"Seq Scan on ({tables})\b", line)
        or (re.match(rf"SCAN ({tables})\b", line.strip()) and "ix_" not in line)
    ]


def sorts(plan: str) -> bool:
    return (
        re.search(r"^[ ->]*(Incremental )?Sort\b|TEMP B-TREE FOR (LAST TERM OF )?ORDER BY", plan, re.MULTILINE)
        is not None
    )


def indexes(plan: str) -> set[str]:
    return set(re.findall(r"\b(?:ix|uq|pk|sqlite_autoindex)_\w+", plan))


def key_plans(found: list[str]) -> str:
    """Of the statements of a list those that find keys: not the ones that read the rows by their ids."""
    return "\n".join(plan for plan in found if indexes(plan) and not indexes(plan) <= PRIMARY)


PRIMARY = {"pk_adapters", "pk_adapter_files", "sqlite_autoindex_adapters_1", "sqlite_autoindex_adapter_files_1"}
BASE, METHOD = AdapterFilter(base_model="org-1/base-001"), AdapterFilter(method="lora")
ADAPTER_LISTS = {
    "all": (AdapterFilter(), "ix_adapters_created"),
    "base_model": (BASE, "ix_adapters_base_model"),
    "rare base_model": (AdapterFilter(base_model="org-12/base-199"), "ix_adapters_base_model"),
    "model id": (AdapterFilter(base_model=pool_rows.MODELS[0]), "ix_adapters_model_id"),
    "method": (METHOD, "ix_adapters_method"),
    "rare method": (AdapterFilter(method="loftq"), "ix_adapters_method"),
    "tag": (AdapterFilter(tag="tag-000"), "adapter_tags"),
    "rare tag": (AdapterFilter(tag="tag-499"), "adapter_tags"),
    "common name": (AdapterFilter(name="-"), "ix_adapters_created"),
    "file": (AdapterFilter(sha256=pool_rows.digest("file", 77)), "ix_adapter_files_content"),
    "shared file": (AdapterFilter(sha256=pool_rows.config_digest(1)), "ix_adapter_files_content"),
    "weights": (AdapterFilter(sha256=pool_rows.digest("weights", 77)), "ix_adapters_weights_digest"),
    "AutoV2": (AdapterFilter(sha256=pool_rows.digest("file", 77)[:10]), "ix_adapter_files_content"),
}


def adapter_cursor(filters: AdapterFilter, number: int) -> str:
    """A cursor in the middle of the list."""
    from dataclasses import asdict

    made = pool_rows.START + timedelta(seconds=2 * number, microseconds=number % 1000)
    return cursor_at((made, pool_rows.identifier("adp", number)), asdict(filters))


@pytest.mark.parametrize("page", ["first", "later"])
@pytest.mark.parametrize("case", ADAPTER_LISTS)
def test_a_list_of_adapters_reads_its_index_in_order(filled: Database, case: str, page: str) -> None:
    filters, index = ADAPTER_LISTS[case]
    cursor = None if page == "first" else adapter_cursor(filters, 7_000)
    found = plans(filled, lambda session: adapters.list_adapters(session, filters, cursor, 20))
    for plan in found:
        assert full_scans(plan) == []
    keys = key_plans(found)
    print("\n\n".join(found))
    assert index in keys
    assert not sorts(keys)
