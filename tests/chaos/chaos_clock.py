"""Jumps of the database's clock.

PostgreSQL has one clock for all, which a function in front of the server's own one shifts (`chaos_databases`). SQLite
asks the clock of each process: here its function for that is replaced, in every connection of a process that follows
the shift in a file.
"""

from __future__ import annotations

import os
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import event

VARIABLE = "RANKWISE_CHAOS_CLOCK"
_FORMAT = "%Y-%m-%d %H:%M:%f"


def follow(target: Any, file: Path) -> None:
    """Shift the clock of all SQLite connections that `target` (an engine, or the class of pools) opens from now on."""

    def replace(connection: Any, _record: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.create_function("strftime", 2, lambda *arguments: _shifted(file, *arguments))

    event.listen(target, "connect", replace)


def follow_from_environment(target: Any) -> None:
    """The same in a process that the tests have started; does nothing where the clock is not shifted."""
    if VARIABLE in os.environ:
        follow(target, Path(os.environ[VARIABLE]))


def _shifted(file: Path, form: str, moment: str) -> str:
    if (form, moment) != (_FORMAT, "now"):
        raise ValueError(f"strftime({form!r}, {moment!r}) can not be shifted")
    told = datetime.now(UTC) + timedelta(seconds=float(file.read_text(encoding="ascii")))
    return told.strftime("%Y-%m-%d %H:%M:%S.") + f"{told.microsecond // 1000:03d}"
