"""Migrations from code: what `rankwise db upgrade` and the start of a server do."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, text

from alembic import command
from artifacts.errors import DatabaseUnavailable, DiskFull
from storage import faults
from storage.database import Database

ROOT = Path(__file__).resolve().parent.parent
ADVISORY_LOCK = 0x52616E6B77697365  # "Rankwise"


def config() -> Config:
    """Alembic's configuration, wherever the process was started."""
    made = Config()
    made.set_main_option("script_location", str(ROOT / "alembic").replace("%", "%%"))
    return made


def upgrade(database: Database, revision: str = "head") -> None:
    """Run the missing migrations in one transaction; of several processes one does it and the others wait."""
    _migrate(database, lambda prepared: command.upgrade(prepared, revision))


def downgrade(database: Database, revision: str) -> None:
    """Undo the migrations after `revision` ("base": all of them); what their tables held is lost."""
    _migrate(database, lambda prepared: command.downgrade(prepared, revision))


def current_revision(database: Database) -> str | None:
    """The revision of the tables; None without tables, or without the file of a SQLite database."""
    if database.path is not None and not database.path.exists():
        return None
    with database.read() as session:
        return MigrationContext.configure(session.connection()).get_current_revision()


def head_revision() -> str:
    """The newest revision in the folder of migrations."""
    head = ScriptDirectory.from_config(config()).get_current_head()
    if head is None:
        raise AssertionError(f"no migrations in {ROOT / 'alembic'}")
    return head


def _migrate(database: Database, run: Callable[[Config], None]) -> None:
    prepared = config()
    engine = database.migration_engine()
    with _file_lock(database), engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": ADVISORY_LOCK})
        prepared.attributes["connection"] = connection
        try:
            run(prepared)
        except CommandError as error:
            raise DatabaseUnavailable(
                f"the tables can not be migrated: {error}",
                hint="The database was migrated by a newer version of Rankwise: use that version.",
            ) from error
        _check_foreign_keys(connection)
    engine.dispose()


def _check_foreign_keys(connection: Connection) -> None:
    """SQLite does not check foreign keys while its tables are replaced, so it is done before the commit."""
    if connection.dialect.name == "sqlite":
        broken = connection.execute(text("PRAGMA foreign_key_check")).first()
        if broken is not None:
            raise AssertionError(f"a migration broke a foreign key of table {broken[0]}, row {broken[1]}")


@contextmanager
def _file_lock(database: Database) -> Iterator[None]:
    """One process at a time creates a SQLite file and switches it to WAL, which its own locks do not cover."""
    if database.path is None:
        yield
        return
    try:
        database.path.parent.mkdir(parents=True, exist_ok=True)
        lock = database.path.with_name(database.path.name + ".lock").open("a")
    except OSError as error:
        if faults.is_disk_full(error):
            raise DiskFull(f"no space left beside {database.path}") from error
        raise DatabaseUnavailable(f"the folder of {database.path} can not be written: {error.strerror}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
