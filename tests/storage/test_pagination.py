from __future__ import annotations

import base64
import json

import pytest
from sqlalchemy import select, update

from artifacts.errors import RequestInvalid
from storage import jobs
from storage.database import Database
from storage.jobs import JobFilter
from storage.tables import JobRow


def walk(database: Database, limit: int, filters: JobFilter | None = None) -> list[list[str]]:
    """The ids of all pages."""
    pages: list[list[str]] = []
    cursor: str | None = None
    while True:
        with database.read() as session:
            page = jobs.list_jobs(session, filters, cursor, limit)
        pages.append([job.id for job in page.items])
        cursor = page.next
        if cursor is None:
            return pages


@pytest.fixture
def made(database: Database) -> list[str]:
    """Seven jobs, newest first; all but two were made in the same instant."""
    with database.write() as session:
        ids = [jobs.create_job(session, "merge", {}).id for _ in range(7)]
        instant = jobs.get_job(session, ids[1]).created_at
        session.execute(update(JobRow).where(JobRow.id.in_(ids[1:6])).values(created_at=instant))
    return ids[::-1]


@pytest.mark.parametrize("limit", [1, 2, 3, 6, 7, 200])
def test_pages_cover_every_row_once_in_order(database: Database, made: list[str], limit: int) -> None:
    pages = walk(database, limit)
    assert [identifier for page in pages for identifier in page] == made
    assert all(len(page) == limit for page in pages[:-1])


def test_an_empty_list_is_one_page(database: Database) -> None:
    assert walk(database, 10) == [[]]


@pytest.mark.parametrize("limit", [0, -1, 201, 10**30])
def test_limits_out_of_range_are_refused(database: Database, limit: int) -> None:
    with database.read() as session, pytest.raises(RequestInvalid) as caught:
        jobs.list_jobs(session, limit=limit)
    assert caught.value.errors[0].pointer == "/limit"


def test_a_cursor_is_good_for_its_filters_only(database: Database, made: list[str]) -> None:
    with database.read() as session:
        cursor = jobs.list_jobs(session, JobFilter(kind="merge"), limit=2).next
        assert jobs.list_jobs(session, JobFilter(kind="merge"), cursor, 5).items
        for other in (JobFilter(), JobFilter(kind="train"), JobFilter(kind="merge", state="queued")):
            with pytest.raises(RequestInvalid, match="other filters"):
                jobs.list_jobs(session, other, cursor, 2)


def encoded(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "x",
        "!!!!",
        "ümlaut",
        "a\x00b",
        encoded([]),
        encoded({"a": 1}),
        encoded(["2026-01-01T00:00:00", "job_1", "0"]),
        encoded(["2026-01-01T00:00:00+00:00", 5, "0"]),
        encoded(["2026-01-01T00:00:00+00:00", "a\x00", "0"]),
        encoded(["0001-01-01T00:00:00+14:00", "job_1", "0"]),
        encoded([1, "job_1", "0"]),
        encoded(["2026-01-01T00:00:00+00:00", "job_1", "0"]),
        base64.urlsafe_b64encode(b"[" * 100_000).decode(),
    ],
)
def test_cursors_that_we_did_not_make_are_refused(database: Database, cursor: str) -> None:
    with database.read() as session, pytest.raises(RequestInvalid) as caught:
        jobs.list_jobs(session, cursor=cursor)
    assert caught.value.errors[0].pointer == "/cursor"


def test_a_cursor_shows_no_filter(database: Database, made: list[str]) -> None:
    with database.read() as session:
        cursor = jobs.list_jobs(session, JobFilter(kind="merge"), limit=1).next
        assert cursor is not None
        assert session.scalars(select(JobRow.id)).all()
    assert b"merge" not in base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
