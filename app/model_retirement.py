"""The dates of base models at work: what has come is done, by whichever server sees it first."""

from __future__ import annotations

import structlog

from storage import retirement
from storage.database import Database

_log = structlog.stdlib.get_logger(__name__)


def retire_models(database: Database) -> None:
    """Publish the deprecations whose date has come, and remove what is to be removed and nothing depends on.

    Raises:
        DatabaseUnavailable, DiskFull: the rest is still due.
    """
    with database.read() as session:  # a look costs no turn at writing
        due = retirement.is_due(session)
    for model_id in due:
        with database.write() as session:
            done = retirement.advance(session, model_id)
        for what in done:
            _log.info(f"base_model_{what}", model=model_id)
