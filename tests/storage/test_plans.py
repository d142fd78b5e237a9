"""How the databases find the rows of every list, and of a claim: by an index, whatever the number of rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
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

PROBE_ROWS, WINDOW_ROWS = 300, 500  # as much smaller than in production as these tables are
SIZES = pool_rows.Sizes(adapters=12_000, finished_jobs=12_000, queued_jobs=2_000)
LARGE = "adapters|adapter_files|adapter_tags|adapter_names|jobs|job_attempts|job_events"
FEW_ROWS = 200  # PostgreSQL may sort so many instead of reading them in order
Call = Callable[[Session], Any]


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """Enough rows, and their statistics, for PostgreSQL to have a reason to use an index."""
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


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.adapter_search.PROBE_ROWS", PROBE_ROWS)
    monkeypatch.setattr("storage.adapter_search.WINDOW_ROWS", WINDOW_ROWS)


@contextmanager
def recorded(database: Database) -> Iterator[list[tuple[str, Any]]]:
    """The statements that are sent to the database, with their parameters."""
    sent: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if re.match(r"(SELECT|UPDATE|WITH|DELETE)\b", statement):
            sent.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(database.engine, "before_cursor_execute", note)


def plans(database: Database, call: Call) -> list[str]:
    """The plan of each statement that `call` sends, one line a step. What it changes is rolled back."""
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
    """Steps that read a large table from end to end, unless by an index of ours, in the order of a list."""
    return [
        line
        for line in map(str.strip, plan.splitlines())
        if re.search(rf"Seq Scan on ({LARGE})\b", line)
        or (re.match(rf"SCAN ({LARGE})\b", line) and not re.search(r"INDEX ix_", line))
    ]


def sorts_many(plan: str) -> bool:
    if re.search(r"TEMP B-TREE FOR (LAST TERM OF )?ORDER BY", plan):
        return True
    estimates = re.findall(r"^[ ->]*Sort +\(.*rows=(\d+)", plan, re.MULTILINE)
    return any(int(rows) > FEW_ROWS for rows in estimates)


def check(found: list[str], *indexes: str) -> None:
    """No full scan in any of the plans; the first one uses one of these indexes and sorts no large number of rows."""
    for plan in found:
        assert full_scans(plan) == [], plan
    ordered = [plan for plan in found if any(re.search(rf"\b{index}\b", plan) for index in indexes)]
    assert ordered, "\n\n".join(found)
    assert not any(sorts_many(plan) for plan in ordered), "\n\n".join(ordered)


def cursor(prefix: str, filters: Any, number: int) -> str:
    """A cursor in the middle of the list."""
    made = pool_rows.START + timedelta(seconds=2 * number, microseconds=number % 1000)
    return cursor_at((made, pool_rows.identifier(prefix, number)), asdict(filters))


TAG_INDEX = ("ix_adapter_tags_tag",)
ADAPTER_LISTS: dict[str, tuple[AdapterFilter, tuple[str, ...]]] = {
    "all": (AdapterFilter(), ("ix_adapters_created",)),
    "base model": (AdapterFilter(base_model="org-1/base-001"), ("ix_adapters_base_model",)),
    "rare base model": (AdapterFilter(base_model="org-12/base-199"), ("ix_adapters_base_model",)),
    "registered model": (AdapterFilter(base_model=pool_rows.MODELS[0]), ("ix_adapters_model_id",)),
    "common method": (AdapterFilter(method="lora"), ("ix_adapters_method",)),
    "rare method": (AdapterFilter(method="loftq"), ("ix_adapters_method",)),
    "tag": (AdapterFilter(tag="tag-000"), TAG_INDEX),
    "rare tag": (AdapterFilter(tag="tag-499"), TAG_INDEX),
    "common name": (AdapterFilter(name="-"), ("ix_adapters_created",)),
    "file": (AdapterFilter(sha256=pool_rows.digest("file", 77)), ("ix_adapter_files_content",)),
    "file of many": (AdapterFilter(sha256=pool_rows.config_digest(1)), ("ix_adapter_files_content",)),
    "weights": (AdapterFilter(sha256=pool_rows.digest("weights", 77)), ("ix_adapters_weights_digest",)),
    "AutoV2": (AdapterFilter(sha256=pool_rows.digest("file", 77)[:10]), ("ix_adapter_files_content",)),
    "base model and method": (
        AdapterFilter(base_model="org-1/base-001", method="dora"),
        ("ix_adapters_base_model", "ix_adapters_method"),
    ),
    "tag and method": (AdapterFilter(tag="tag-300", method="lora"), (*TAG_INDEX, "ix_adapters_method")),
}


@pytest.mark.parametrize("page", ["first", "later"])
@pytest.mark.parametrize("case", ADAPTER_LISTS)
def test_a_list_of_adapters_is_read_from_its_index_in_order(filled: Database, case: str, page: str) -> None:
    filters, indexes = ADAPTER_LISTS[case]
    start = None if page == "first" else cursor("adp", filters, 7_000)
    check(keys_only(plans(filled, lambda session: adapters.list_adapters(session, filters, start, 20))), *indexes)


def keys_only(found: list[str]) -> list[str]:
    """Without the plans that read the chosen rows and their files by primary keys: those sort a page at most."""
    rows = re.compile(r"(pk_adapters|sqlite_autoindex_adapters_1|pk_adapter_files|sqlite_autoindex_adapter_files_1)\b")
    return [plan for plan in found if not (rows.search(plan) and not re.search(r"\bix_|adapter_tags", plan))]


@pytest.mark.parametrize("name", ["0004242", "zzzqqq", "ж", "qz"])
def test_a_rare_part_of_a_name_is_found_in_the_index_of_names(filled: Database, name: str) -> None:
    found = plans(filled, lambda session: adapters.list_adapters(session, AdapterFilter(name=name), None, 20))
    for plan in found:
        assert full_scans(plan) == [], plan
    index = r"adapter_name_(grams|terms) VIRTUAL TABLE INDEX" if filled.is_sqlite else "ix_adapters_name_grams"
    assert any(re.search(index, plan) for plan in found), "\n\n".join(found)


@pytest.mark.parametrize("page", ["first", "later"])
def test_a_tag_with_other_filters_is_looked_through_without_the_adapters(filled: Database, page: str) -> None:
    filters = AdapterFilter(tag="tag-300", method="lora", base_model="org-0/base-000", name="a")
    start = None if page == "first" else cursor("adp", filters, 7_000)
    found = plans(filled, lambda session: adapters.list_adapters(session, filters, start, 20))
    of_tags = [plan for plan in keys_only(found) if "ix_adapter_tags_tag" in plan]
    assert of_tags
    for plan in of_tags:
        assert not re.search(r"\bix_adapters_|pk_adapters", plan), plan


def test_looking_through_names_does_not_read_the_table(filled: Database) -> None:
    """On PostgreSQL the planner may do otherwise while little is in the table; the index has all that it needs."""
    found = plans(filled, lambda session: adapters.list_adapters(session, AdapterFilter(name="q"), None, 20))
    if filled.is_sqlite:
        assert any("USING COVERING INDEX ix_adapters_created" in plan for plan in found), "\n\n".join(found)
    else:
        assert any(re.search(r"Index (Only )?Scan Backward using ix_adapters_created", plan) for plan in found)


JOB_LISTS: dict[str, tuple[JobFilter, tuple[str, ...]]] = {
    "all": (JobFilter(), ("ix_jobs_created",)),
    "kind": (JobFilter(kind="train"), ("ix_jobs_kind",)),
    "unknown kind": (JobFilter(kind="none"), ("ix_jobs_kind",)),
    "queued": (JobFilter(state="queued"), ("ix_jobs_state",)),
    "running": (JobFilter(state="running"), ("ix_jobs_state",)),
    "succeeded": (JobFilter(state="succeeded"), ("ix_jobs_state",)),
    "kind and state": (JobFilter(kind="merge", state="cancelled"), ("ix_jobs_kind_state",)),
}


@pytest.mark.parametrize("page", ["first", "later"])
@pytest.mark.parametrize("case", JOB_LISTS)
def test_a_list_of_jobs_is_read_from_its_index_in_order(filled: Database, case: str, page: str) -> None:
    filters, indexes = JOB_LISTS[case]
    start = None if page == "first" else cursor("job", filters, 7_000)
    check(plans(filled, lambda session: jobs.list_jobs(session, filters, start, 20)), *indexes)


def test_a_claim_takes_the_head_of_the_queue_from_its_index(filled: Database) -> None:
    offer = SlotOffer("cpu:0", "host", pid=1)
    found = plans(
        filled,
        lambda session: claims.claim_many(
            session, server_id="srv_1", boot_id="run_1", slots=[offer, offer], lease_seconds=60.0
        ),
    )
    check(found, "ix_jobs_queue")


def test_a_sign_of_life_looks_at_running_jobs_only(filled: Database) -> None:
    found = plans(filled, claims.expire_leases)
    for plan in found:
        assert full_scans(plan) == [], plan
    assert any(re.search("ix_jobs_(active|state)", plan) for plan in found), "\n\n".join(found)


def test_a_submission_counts_no_jobs(filled: Database) -> None:
    found = plans(filled, lambda session: jobs.create_job(session, "merge", {}, max_queued=10**6))
    for plan in found:
        assert full_scans(plan) == [], plan
        assert "ix_jobs" not in plan, plan


def test_models_are_listed_without_their_fingerprints(filled: Database) -> None:
    with recorded(filled) as sent, filled.read() as session:
        assert len(models.list_models(session, None, 20).items) == 20
    assert not any(re.search(r"models\.fingerprint\b(?!_)", statement) for statement, _ in sent)
