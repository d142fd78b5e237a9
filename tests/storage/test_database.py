from __future__ import annotations

import os
import sqlite3
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from artifacts.errors import DatabaseUnavailable, RequestInvalid
from storage import claims, jobs
from storage.database import Database, now, parse_url
from storage.tables import JobEventRow, JobRow


def job_count(database: Database) -> int:
    with database.read() as session:
        return len(session.scalars(select(JobRow.id)).all())


def test_write_commits_and_an_error_in_the_body_rolls_back(database: Database) -> None:
    with database.write() as session:
        jobs.create_job(session, "merge", {})
    with pytest.raises(RuntimeError, match="changed my mind"), database.write() as session:
        jobs.create_job(session, "merge", {})
        raise RuntimeError("changed my mind")
    assert job_count(database) == 1


def test_a_reading_session_can_not_write(database: Database) -> None:
    with pytest.raises(DBAPIError), database.read() as session:
        jobs.create_job(session, "merge", {})
    assert job_count(database) == 0
    with database.write() as session:  # a connection that has read can write again
        jobs.create_job(session, "merge", {})
    assert job_count(database) == 1


def test_now_is_the_time_in_utc_and_advances(database: Database) -> None:
    with database.read() as session:
        first, second = now(session), now(session)
    assert first.utcoffset() == timedelta(0)
    assert abs(first - datetime.now(UTC)) < timedelta(seconds=30)
    assert second >= first


def test_foreign_keys_hold(database: Database) -> None:
    with pytest.raises(IntegrityError), database.write() as session:
        moment = now(session)
        session.add(JobEventRow(job_id="job_none", sequence=1, type="state", data={}, created_at=moment))


def test_times_come_back_aware_and_equal(database: Database) -> None:
    with database.write() as session:
        job = jobs.create_job(session, "merge", {})
        stored = datetime(2026, 3, 4, 5, 6, 7, 890123, tzinfo=UTC)
        job.available_at = stored.astimezone()
    with database.read() as session:
        assert jobs.get_job(session, job.id).available_at == stored


def test_values_that_json_lacks_become_an_error_of_the_request(database: Database) -> None:
    with pytest.raises(RequestInvalid), database.write() as session:
        jobs.create_job(session, "merge", {"weight": float("nan")})
    with pytest.raises(RequestInvalid), database.write() as session:
        jobs.create_job(session, "merge", {"name": "a\x00b"})
    assert job_count(database) == 0


def test_writers_in_threads_lose_nothing(database: Database) -> None:
    with database.write() as session:
        job = jobs.create_job(session, "merge", {})
        claims.claim_next(session, server_id="s", boot_id="b", slot="cpu:0", lease_seconds=60)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(10):
                with database.write() as session:
                    claims.record_progress(session, job.id, 1, fraction=0.5, message=f"{number}.{step}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with database.read() as session:
        events = jobs.events_after(session, job.id, 0)
    assert [event.sequence for event in events] == list(range(1, 83))


def test_check_passes_on_a_migrated_database(database: Database) -> None:
    database.check()


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:x?mode=memory",
        "mysql://host/db",
        "postgresql+asyncpg://h/d",
        "?",
    ],
)
def test_databases_that_can_not_work_are_refused(url: str) -> None:
    with pytest.raises(DatabaseUnavailable) as caught:
        parse_url(url)
    assert "sqlite:///" in (caught.value.hint or "")


@pytest.mark.parametrize("url", ["postgres://u:p@h/d", "postgresql://u:p@h/d", "postgresql+psycopg://u:p@h/d"])
def test_postgres_urls_use_psycopg_3(url: str) -> None:
    assert parse_url(url).drivername == "postgresql+psycopg"


def test_sqlite_uses_wal_and_a_busy_timeout(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'new' / 'folder' / 'r.db'}")
    database.upgrade()
    with database.read() as session:
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"
        assert session.scalar(text("PRAGMA busy_timeout")) >= 5000
        assert session.scalar(text("PRAGMA foreign_keys")) == 1
    database.dispose()


@pytest.mark.parametrize("name", ["with space.db", "per%cent.db", "hash#mark.db", "question?mark=1.db", "ümlaut.db"])
def test_sqlite_files_may_have_odd_names(tmp_path: Path, name: str) -> None:
    database = Database(f"sqlite:///{quote(str(tmp_path / name))}")
    database.upgrade()
    database.check()
    database.dispose()
    assert (tmp_path / name).stat().st_size > 0


def test_a_writer_of_sqlite_takes_the_lock_at_the_start(tmp_path: Path, sqlite_template: Path) -> None:
    database = Database(f"sqlite:///{copied(sqlite_template, tmp_path)}")
    with database.write() as session:
        other = sqlite3.connect(tmp_path / "r.db", timeout=0)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        other.close()
        assert session.scalar(select(JobRow.id)) is None
    database.dispose()


def test_readers_of_sqlite_do_not_wait_for_a_writer(tmp_path: Path, sqlite_template: Path) -> None:
    database = Database(f"sqlite:///{copied(sqlite_template, tmp_path)}")
    with database.write() as session:
        jobs.create_job(session, "merge", {})
        assert job_count(database) == 0
    assert job_count(database) == 1
    database.dispose()


def test_a_fork_does_not_share_connections(database: Database) -> None:
    with database.write() as session:
        job = jobs.create_job(session, "merge", {})
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        answer = b"failed"
        try:
            assert database.engine.pool.checkedin() == 0  # type: ignore[attr-defined]
            with database.write() as session:
                jobs.request_cancel(session, job.id)
            answer = b"done"
        finally:
            os.write(writer, answer)
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    assert os.read(reader, 10) == b"done"
    os.close(reader)
    with database.read() as session:  # the parent's connection was not closed by the child
        assert jobs.get_job(session, job.id).state == "cancelled"


def copied(template: Path, folder: Path) -> Path:
    target = folder / "r.db"
    target.write_bytes(template.read_bytes())
    return target


@pytest.mark.postgres
def test_a_statement_that_takes_too_long_is_given_up(postgres_database: Database) -> None:
    with postgres_database.read() as session:
        assert session.scalar(text("SHOW statement_timeout")) == "1min"
    with pytest.raises(DatabaseUnavailable, match="statement timeout"), postgres_database.write() as session:
        session.execute(text("SET LOCAL statement_timeout = '20ms'"))
        session.execute(text("SELECT pg_sleep(5)"))
