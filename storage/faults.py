"""Which failure of a database driver means what: gone, busy, full, or a bug that must stay visible."""

from __future__ import annotations

import errno

from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from artifacts.errors import DatabaseUnavailable, DiskFull, RankwiseError, RequestInvalid

_FULL_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SQLITE_GONE = (
    "SQLITE_CANTOPEN",
    "SQLITE_IOERR",
    "SQLITE_NOTADB",
    "SQLITE_CORRUPT",
    "SQLITE_READONLY",
    "SQLITE_PERM",
    "SQLITE_AUTH",
    "SQLITE_PROTOCOL",
    "SQLITE_NOMEM",
)
# A quota or a limit of the file size is reported as a failed write, a full disk under the WAL index as a failed resize.
_SQLITE_FULL = ("SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE")
_SQLITE_BUSY = ("SQLITE_BUSY", "SQLITE_LOCKED")
# Classes of SQLSTATE: connection, invalid authorization, no such database, resources, operator intervention, system.
_POSTGRES_GONE = ("08", "28", "3D", "53", "57P", "58", "XX")
# Serialisation failure, deadlock, lock not available, a standby that takes no writes, a statement over its time.
_POSTGRES_BUSY = ("40001", "40P01", "55P03", "25006", "57014")
# Values that a column does not take, SQLSTATE class 22 among them; U+0000 is refused before it has a state.
_POSTGRES_REFUSED = ("DataError", "StringDataRightTruncation", "NumericValueOutOfRange")
_UPGRADE = "Run `rankwise db upgrade`, then try again."


def is_disk_full(error: OSError) -> bool:
    """Whether the operating system refused to write for want of space, quota or file size."""
    return error.errno in _FULL_ERRNO


def translate(error: Exception, *, writing: bool) -> RankwiseError | None:
    """The error of our tree that this failure is; None if it is a bug or a violated constraint.

    Args:
        writing: whether the session may write: a refused write is a fault of the database in one that may, a bug in
            one that may not.
    """
    if isinstance(error, PoolTimeout):
        return DatabaseUnavailable("no database connection became free in time", hint="Try again in a moment.")
    if not isinstance(error, StatementError):
        return None
    if isinstance(error.orig, RankwiseError):  # raised while a value was made ready for the database
        return error.orig
    if not isinstance(error, DBAPIError) or error.orig is None:
        return None
    name: str | None = getattr(error.orig, "sqlite_errorname", None)
    if not writing and (name == "SQLITE_READONLY" or getattr(error.orig, "sqlstate", None) == "25006"):
        return None
    if name is not None:
        return _translate_sqlite(name, str(error.orig))
    if hasattr(error.orig, "sqlstate"):
        return _translate_postgres(error, getattr(error.orig, "sqlstate", None), str(error.orig).strip())
    return None


def _translate_sqlite(name: str, message: str) -> RankwiseError | None:
    if name in _SQLITE_FULL:
        return DiskFull(
            f"the database file can not grow: {message}",
            hint="Free space on its disk, or raise the quota or file limit.",
        )
    if name.startswith(_SQLITE_BUSY):
        return DatabaseUnavailable(f"the database stayed locked by another writer ({message})", hint="Try again.")
    if name.startswith(_SQLITE_GONE):
        return DatabaseUnavailable(f"the database file can not be used: {message}")
    if name == "SQLITE_ERROR" and message.startswith(("no such table", "no such column")):
        return DatabaseUnavailable(f"the database has not the tables of this version: {message}", hint=_UPGRADE)
    return None


def _translate_postgres(error: DBAPIError, state: str | None, message: str) -> RankwiseError | None:
    if state == "53100":
        return DiskFull("the disk of the database server is full", hint="Free some space there, then try again.")
    if type(error.orig).__name__ in _POSTGRES_REFUSED or (state is not None and state.startswith("22")):
        return RequestInvalid(f"a value can not be stored: {message}", hint="Send a shorter or smaller value.")
    if state in ("42P01", "42703"):
        return DatabaseUnavailable(f"the database has not the tables of this version: {message}", hint=_UPGRADE)
    if state in _POSTGRES_BUSY:
        return DatabaseUnavailable(f"the database could not serve this now: {message}", hint="Try again.")
    lost = error.connection_invalidated or (state is None and type(error.orig).__name__ == "OperationalError")
    if lost or (state is not None and state.startswith(_POSTGRES_GONE)):
        return DatabaseUnavailable(f"the database does not answer: {message}")
    return None
