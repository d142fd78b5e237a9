"""The database: engine, sessions for reading and writing, its clock, and its failures as errors of our tree."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, func, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DisconnectionError, SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry, NullPool, Pool

from artifacts.errors import DatabaseUnavailable
from storage import faults, text

BUSY_TIMEOUT_SECONDS = 10
IDLE_IN_TRANSACTION_SECONDS = 120
CACHE_KIB = 16 << 10  # of each SQLite connection; its own 2 MiB do not hold the upper levels of large indexes
STATEMENT_SECONDS = 60  # nothing that a server asks takes nearly as long; migrations have connections of their own
POOL_SIZE = 10
POOL_OVERFLOW = 30  # the HTTP thread pool has 40 threads
_BEGIN = "rankwise_begin"

# Pools of a parent process: its children must neither use nor close those connections, so they are kept for ever.
_inherited: list[Pool] = []


def parse_url(url: str) -> URL:
    """The URL with its driver: `sqlite:///file`, `postgresql://…` and `postgres://…` (psycopg 3).

    Raises:
        DatabaseUnavailable: not a URL, another database, or SQLite in memory, which other processes can not see.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise DatabaseUnavailable("the database URL can not be parsed", hint=_URL_HINT) from error
    kind, _, driver = parsed.drivername.partition("+")
    if kind in ("postgresql", "postgres") and driver in ("", "psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    if kind == "sqlite" and driver in ("", "pysqlite"):
        if not parsed.database or parsed.database == ":memory:" or parsed.database.startswith("file:"):
            raise DatabaseUnavailable("SQLite needs a file that every process can open", hint=_URL_HINT)
        return parsed.set(drivername="sqlite+pysqlite", database=str(Path(parsed.database).absolute()))
    raise DatabaseUnavailable(f"the database {parsed.drivername!r} is not supported", hint=_URL_HINT)


_URL_HINT = "Use sqlite:///path/to/rankwise.db or postgresql://user:password@host/database."


class Database:
    """One database, safe to use from many threads. After a fork the child starts with an empty pool.

    On SQLite, writers take the lock at BEGIN (no deadlock on upgrading a read lock) and queue up inside this
    process before they compete with others. The file must exist: `upgrade` makes it.

    Args:
        url: see `parse_url`.
    """

    def __init__(self, url: str) -> None:
        self.url = parse_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self._writer = threading.Lock()
        self.engine = self._create_engine()
        options: dict[str, Any] = {_BEGIN: "read"} if self.is_sqlite else {"postgresql_readonly": True}
        self._readers = sessionmaker(self.engine.execution_options(**options), expire_on_commit=False)
        self._writers = sessionmaker(self.engine.execution_options(**{_BEGIN: "write"}), expire_on_commit=False)
        _forget_pool_after_fork(self)

    @property
    def path(self) -> Path | None:
        """The file of a SQLite database."""
        return Path(str(self.url.database)) if self.is_sqlite else None

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session on one consistent state (PostgreSQL: per statement) that can not write.

        Raises:
            DatabaseUnavailable: the database is gone, stayed busy, or has not this version's tables.
        """
        with self._translated(writing=False), self._readers() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session in one transaction: committed at the end, rolled back if the body raises.

        Not re-entrant: a second `write` inside the first, in the same thread, waits for itself and fails.

        Raises:
            DatabaseUnavailable: the database is gone, stayed busy, or has not this version's tables.
            DiskFull: no space for the change; nothing of it is kept.
        """
        with self._translated(), self._writer_turn(), self._writers() as session:
            session.connection()  # take the lock now: what is read from here on is what will be changed
            yield session
            session.commit()

    def upgrade(self) -> None:
        """Bring the tables to this version's; creates the SQLite file. Safe when several processes start at once."""
        from storage import migrations

        with self._translated():
            migrations.upgrade(self)

    def current_revision(self) -> str | None:
        """The revision that the tables have; None if there are none."""
        from storage import migrations

        with self._translated():
            return migrations.current_revision(self)

    def head_revision(self) -> str:
        """The revision that this version of the code needs."""
        from storage import migrations

        return migrations.head_revision()

    def check(self) -> None:
        """Raise DatabaseUnavailable unless the database answers and has this version's tables."""
        if self.path is not None and not self.path.exists():
            raise DatabaseUnavailable(f"there is no database file {self.path}", hint="Run `rankwise db upgrade`.")
        current, head = self.current_revision(), self.head_revision()
        if current != head:
            raise DatabaseUnavailable(
                f"the tables are at revision {current or 'none'}, this version needs {head}",
                hint="Run `rankwise db upgrade`.",
            )

    def dispose(self) -> None:
        """Close all idle connections."""
        self.engine.dispose()

    def migration_engine(self) -> Engine:
        """An engine of single-use connections for DDL, which creates the file of a SQLite database.

        On SQLite foreign keys are off, since changing a table there means replacing it, and that pragma can not be
        set inside a transaction.
        """
        if not self.is_sqlite:
            return create_engine(self.url, poolclass=NullPool, connect_args={"connect_timeout": BUSY_TIMEOUT_SECONDS})
        engine = create_engine(self.url, poolclass=NullPool, connect_args={"timeout": BUSY_TIMEOUT_SECONDS})
        event.listen(engine, "connect", _prepare_sqlite_migration)
        event.listen(engine, "begin", _begin_sqlite)
        return engine.execution_options(**{_BEGIN: "migrate"})

    def _create_engine(self) -> Engine:
        if self.is_sqlite:
            # mode=rw: a file that was removed is an error, not a new and empty database.
            location = self.url.set(
                database=f"file:{_uri_path(str(self.url.database))}", query={"mode": "rw", "uri": "true"}
            )
            engine = create_engine(
                location,
                pool_size=POOL_SIZE,
                max_overflow=POOL_OVERFLOW,
                pool_timeout=BUSY_TIMEOUT_SECONDS,
                json_serializer=text.dump_json,
                hide_parameters=True,  # some columns are confidential, and errors go into logs
                connect_args={"timeout": BUSY_TIMEOUT_SECONDS, "check_same_thread": False},
            )
            file = Path(str(self.url.database))
            event.listen(engine, "connect", lambda connection, record: _prepare_sqlite(connection, record, file))
            event.listen(engine, "checkout", lambda _connection, record, _proxy: _refuse_replaced_file(record, file))
            event.listen(engine, "begin", _begin_sqlite)
            return engine
        engine = create_engine(
            self.url,
            pool_size=POOL_SIZE,
            max_overflow=POOL_OVERFLOW,
            pool_timeout=BUSY_TIMEOUT_SECONDS,
            pool_pre_ping=True,
            pool_recycle=1800,
            json_serializer=text.dump_json,
            hide_parameters=True,
            connect_args={
                "connect_timeout": BUSY_TIMEOUT_SECONDS,
                "application_name": "rankwise",
                # A server that vanished without a word is noticed, also in the middle of a statement.
                "keepalives_idle": 15,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "tcp_user_timeout": 30_000,
            },
        )
        event.listen(engine, "connect", _prepare_postgres)
        return engine

    @contextmanager
    def _writer_turn(self) -> Iterator[None]:
        """One writer of this process at a time on SQLite: a queue is fairer and quicker than polling its file lock."""
        if not self.is_sqlite:
            yield
            return
        if not self._writer.acquire(timeout=BUSY_TIMEOUT_SECONDS):
            raise DatabaseUnavailable("the database stayed locked by another writer", hint="Try again.")
        try:
            yield
        finally:
            self._writer.release()

    @contextmanager
    def _translated(self, *, writing: bool = True) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            translated = faults.translate(error, writing=writing)
            if translated is None:
                raise
            raise translated from error


def now(session: Session) -> datetime:
    """The time by the database's clock, which every server shares: UTC; milliseconds on SQLite."""
    if session.get_bind().dialect.name == "sqlite":
        told = session.scalar(select(func.strftime("%Y-%m-%d %H:%M:%f", "now")))
        return datetime.strptime(f"{told}+0000", "%Y-%m-%d %H:%M:%S.%f%z")
    moment = session.scalar(select(func.clock_timestamp()))
    if not isinstance(moment, datetime):  # a driver that changes its types would corrupt every lease
        raise DatabaseUnavailable(f"the database's clock answered {moment!r}")
    return moment.astimezone(UTC)


def _uri_path(path: str) -> str:
    """A path as SQLite's URI file names want it; SQLAlchemy takes the query off at the first question mark."""
    return path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def _prepare_sqlite(connection: Any, record: ConnectionPoolEntry, file: Path) -> None:
    connection.isolation_level = None  # the driver's own BEGIN comes too late and is never IMMEDIATE
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_SECONDS * 1000}")
    connection.execute("PRAGMA synchronous=FULL")  # a job that was accepted survives a power cut
    connection.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
    record.info["file"] = _file_identity(file)


def _prepare_sqlite_migration(connection: Any, record: ConnectionPoolEntry) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys=OFF")
    connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_SECONDS * 1000}")
    connection.execute("PRAGMA journal_mode=WAL")


def _prepare_postgres(connection: Any, record: ConnectionPoolEntry) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET TIME ZONE 'UTC'")
        cursor.execute(f"SET lock_timeout = '{BUSY_TIMEOUT_SECONDS}s'")
        cursor.execute(f"SET statement_timeout = '{STATEMENT_SECONDS}s'")
        # a process that hangs inside a transaction must not keep a job locked for ever
        cursor.execute(f"SET idle_in_transaction_session_timeout = '{IDLE_IN_TRANSACTION_SECONDS}s'")
    connection.commit()


def _begin_sqlite(connection: Connection) -> None:
    kind = connection.get_execution_options().get(_BEGIN, "write")
    if kind != "migrate":
        connection.exec_driver_sql(f"PRAGMA query_only={int(kind == 'read')}")
    connection.exec_driver_sql("BEGIN" if kind == "read" else "BEGIN IMMEDIATE")


def _file_identity(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _refuse_replaced_file(record: ConnectionPoolEntry, file: Path) -> None:
    """A connection to a file that was since removed or replaced would write into nowhere without an error."""
    if record.info.get("file") != _file_identity(file):
        raise DisconnectionError("the database file was removed or replaced")


def _forget_pool_after_fork(database: Database) -> None:
    reference = weakref.ref(database)

    def renew() -> None:
        survivor = reference()
        if survivor is not None:
            _inherited.append(survivor.engine.pool)
            survivor.engine.dispose(close=False)
            survivor._writer = threading.Lock()  # its holder does not exist in the child

    os.register_at_fork(after_in_child=renew)
