from __future__ import annotations

import resource
import signal
import sqlite3
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import pytest
from sqlalchemy import create_engine, event, select, text
from sqlalchemy.exc import DBAPIError, OperationalError

from artifacts.errors import DatabaseUnavailable, DiskFull, RequestInvalid
from storage import claims, faults, jobs
from storage.database import Database
from storage.tables import JobRow


def job_count(database: Database) -> int:
    with database.read() as session:
        return len(session.scalars(select(JobRow.id)).all())


def test_a_database_that_stays_locked_is_unavailable(
    tmp_path: Path, sqlite_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.database.BUSY_TIMEOUT_SECONDS", 0.05)
    database = Database(f"sqlite:///{copied(sqlite_template, tmp_path)}")
    other = sqlite3.connect(tmp_path / "r.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseUnavailable, match="locked"), database.write():
        pass
    other.execute("ROLLBACK")
    other.close()
    with database.write() as session:
        jobs.create_job(session, "merge", {})
    assert job_count(database) == 1
    database.dispose()


def test_a_second_write_in_one_thread_fails_and_does_not_hang(
    tmp_path: Path, sqlite_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.database.BUSY_TIMEOUT_SECONDS", 0.05)
    database = Database(f"sqlite:///{copied(sqlite_template, tmp_path)}")
    with pytest.raises(DatabaseUnavailable), database.write(), database.write():
        pass
    database.dispose()


def test_a_missing_sqlite_file_is_unavailable_and_is_not_made(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'none.db'}")
    for use in (database.read, database.write):
        with pytest.raises(DatabaseUnavailable, match="unable to open"), use():
            job_count(database)
    with pytest.raises(DatabaseUnavailable, match="no database file"):
        database.check()
    assert database.current_revision() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("replace", [False, True])
def test_a_sqlite_file_removed_under_open_connections_is_noticed(
    tmp_path: Path, sqlite_template: Path, replace: bool
) -> None:
    database = Database(f"sqlite:///{copied(sqlite_template, tmp_path)}")
    with database.write() as session:
        jobs.create_job(session, "merge", {})
    for file in tmp_path.iterdir():
        file.unlink()
    if replace:
        copied(sqlite_template, tmp_path)
        assert job_count(database) == 0
    else:
        with pytest.raises(DatabaseUnavailable), database.write():
            pass
    database.dispose()


def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "r.db").write_bytes(b"not a database at all, but long enough to be read as one" * 50)
    database = Database(f"sqlite:///{tmp_path / 'r.db'}")
    with pytest.raises(DatabaseUnavailable):
        job_count(database)
    with pytest.raises(DatabaseUnavailable):
        database.upgrade()
    database.dispose()


def test_an_empty_database_names_the_upgrade(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "r.db").close()
    database = Database(f"sqlite:///{tmp_path / 'r.db'}")
    with pytest.raises(DatabaseUnavailable) as caught:
        job_count(database)
    assert "rankwise db upgrade" in (caught.value.hint or "")
    with pytest.raises(DatabaseUnavailable, match="revision none"):
        database.check()
    database.dispose()


def _fill_the_disk(url: str, answers: SimpleQueue[str]) -> None:
    """In a child: the file may not grow past a limit, so SQLite gets a short write as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    database = Database(url)
    with database.write() as session:
        kept = jobs.create_job(session, "merge", {}).id
    limit = max(file.stat().st_size for file in Path(str(database.path)).parent.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        with database.write() as session:
            jobs.create_job(session, "merge", {"filler": "x" * 3_000_000})
        answers.put("no error")
    except Exception as error:
        answers.put(type(error).__name__)
    with database.read() as session:
        answers.put("kept" if list(session.scalars(select(JobRow.id))) == [kept] else "lost")
    database.dispose()


def test_a_write_beyond_the_file_size_limit_fails_cleanly(
    tmp_path: Path, sqlite_template: Path, processes: ForkServerContext
) -> None:
    answers = processes.SimpleQueue()
    child = processes.Process(target=_fill_the_disk, args=(f"sqlite:///{copied(sqlite_template, tmp_path)}", answers))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert (answers.get(), answers.get()) == ("DiskFull", "kept")


def test_a_full_disk_under_sqlite_keeps_what_was_there(small_disk: Path, sqlite_template: Path) -> None:
    database = Database(f"sqlite:///{copied(sqlite_template, small_disk)}")
    with database.write() as session:
        kept = jobs.create_job(session, "merge", {}).id
    with pytest.raises(DiskFull), database.write() as session:
        jobs.create_job(session, "merge", {"filler": "x" * 3_000_000})
    with database.read() as session:
        assert session.scalars(select(JobRow.id)).all() == [kept]
    with database.write() as session:  # a smaller change still fits
        jobs.create_job(session, "merge", {})
    assert job_count(database) == 2
    database.dispose()


def test_a_database_at_its_page_limit_is_a_full_disk(tmp_path: Path, sqlite_template: Path) -> None:
    """SQLite answers SQLITE_FULL exactly as it does when a disk is full."""
    database = Database(f"sqlite:///{copied(sqlite_template, tmp_path)}")

    def limit(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA max_page_count=1")  # SQLite rounds it up to what is in use

    event.listen(database.engine, "connect", limit)
    with pytest.raises(DiskFull), database.write() as session:
        jobs.create_job(session, "merge", {"filler": "x" * 500_000})
    assert job_count(database) == 0
    database.dispose()


@pytest.mark.postgres
def test_a_postgres_server_that_closes_connections_is_met_with_new_ones(postgres_database: Database) -> None:
    other = Database(str(postgres_database.url))
    job_count(other)
    with postgres_database.engine.connect() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND datname = current_database()"
        )
    assert job_count(other) == 0
    other.dispose()


@pytest.mark.postgres
def test_a_connection_lost_in_a_transaction_is_unavailable(postgres_database: Database) -> None:
    with pytest.raises(DatabaseUnavailable), postgres_database.write() as session:
        backend = session.scalar(text("SELECT pg_backend_pid()"))
        with postgres_database.engine.begin() as connection:
            connection.exec_driver_sql(f"SELECT pg_terminate_backend({backend}, 5000)")
        jobs.create_job(session, "merge", {})
    assert job_count(postgres_database) == 0


@pytest.mark.postgres
def test_an_unknown_postgres_database_or_host_is_unavailable(postgres_server: object, tmp_path: Path) -> None:
    uri: Callable[..., str] = postgres_server.get_uri  # type: ignore[attr-defined]
    for url in (uri(database="nobody_made_this"), f"postgresql://u@/d?host={tmp_path}", "postgresql://u@127.0.0.1:1/d"):
        with pytest.raises(DatabaseUnavailable, match="does not answer"):
            job_count(Database(url))


@pytest.mark.postgres
def test_an_empty_postgres_database_names_the_upgrade(new_postgres: Callable[[], str]) -> None:
    database = Database(new_postgres())
    with pytest.raises(DatabaseUnavailable) as caught:
        job_count(database)
    assert "rankwise db upgrade" in (caught.value.hint or "")
    with pytest.raises(DatabaseUnavailable, match="revision none"):
        database.check()
    database.dispose()


@pytest.mark.postgres
@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("53100", DiskFull),
        ("40P01", DatabaseUnavailable),
        ("57P01", DatabaseUnavailable),
        ("25006", DatabaseUnavailable),
    ],
)
def test_sqlstates_of_postgres_are_told_apart(postgres_database: Database, state: str, kind: type[Exception]) -> None:
    with pytest.raises(kind), postgres_database.write() as session:
        session.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'made up' USING ERRCODE = '{state}'; END $$"))


@pytest.mark.postgres
@pytest.mark.parametrize("change", [{"message": "x" * 501}, {"message": "a\x00b"}, {"step": 2**40}])
def test_values_that_postgres_refuses_are_errors_of_the_request(
    postgres_database: Database, change: dict[str, object]
) -> None:
    with pytest.raises(RequestInvalid, match="can not be stored"), postgres_database.write() as session:
        job = jobs.create_job(session, "merge", {})
        for name, value in change.items():
            setattr(job, name, value)
    assert job_count(postgres_database) == 0


@pytest.mark.postgres
def test_a_process_that_hangs_in_a_transaction_is_cut_off(
    postgres_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.database.IDLE_IN_TRANSACTION_SECONDS", 0.1)
    hanging = Database(str(postgres_database.url))
    with pytest.raises(DatabaseUnavailable), hanging.write() as session:
        job = jobs.create_job(session, "merge", {})
        backend = session.scalar(text("SELECT pg_backend_pid()"))
        wait_for_the_end_of(postgres_database, backend)
        claims.fence(session, job.id, 1)
    assert job_count(postgres_database) == 0
    hanging.dispose()


def wait_for_the_end_of(database: Database, backend: int | None) -> None:
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while connection.scalar(text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid"), {"pid": backend}):
            connection.execute(text("SELECT pg_sleep(0.02)"))


def test_a_bug_is_not_hidden_as_an_outage(database: Database) -> None:
    with pytest.raises(DBAPIError), database.read() as session:
        session.execute(text("SELEKT 1"))


def test_only_failures_of_the_database_are_translated() -> None:
    assert faults.translate(ValueError("x"), writing=True) is None
    engine = create_engine("sqlite://")
    with pytest.raises(OperationalError) as caught, engine.connect() as connection:
        connection.execute(text("SELECT * FROM absent"))
    assert isinstance(faults.translate(caught.value, writing=False), DatabaseUnavailable)
    engine.dispose()


def copied(template: Path, folder: Path) -> Path:
    target = folder / "r.db"
    target.write_bytes(template.read_bytes())
    return target
