"""The chores of a server: what is done again and again beside serving requests and running jobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog

from app.egress_policies import webhook_policy
from app.federations import settle_federations
from app.model_retirement import retire_models
from app.scheduling import Scheduler
from app.settings import Settings
from artifacts.errors import BlobStoreUnavailable, DatabaseUnavailable, RankwiseError
from storage import deliveries, idempotency, uploads
from storage.blobs import BlobStore
from storage.database import Database
from storage.log_rescue import rescue_logs
from storage.sweep import remove_unused, sweep_blobs
from workers.clockwork import Chore
from workers.courier import Courier

SCHEDULE_SECONDS = 1.0
RETIREMENT_SECONDS = 5.0
WEBHOOK_SECONDS = 1.0
FEDERATION_SECONDS = 1.0
HOUR_SECONDS = 3600.0
AFTER_START_SECONDS = 60.0
"""Cleaning up waits until a server that has just started is done with more urgent things."""
MOST_FAILURES = 5
"""Blobs of one batch that a store may fail to remove: each try may last until its time limit."""

_log = structlog.stdlib.get_logger(__name__)


def _nobody(kind: str) -> None:
    """Nobody wants to know of a job that a schedule has made."""


def chores(
    settings: Settings, database: Database, blobs: BlobStore, *, fired: Callable[[str], None] = _nobody
) -> list[Chore]:
    """The chores of every process that stays up: `rankwise serve`, with a pool or without, and `rankwise worker`.

    Several servers do them side by side without harm.

    Args:
        fired: told the kind of every job that a schedule has made here.
    """
    scheduler = Scheduler(settings, database, fired)
    courier = Courier(database, webhook_policy(settings))
    return [
        Chore("schedules", SCHEDULE_SECONDS, scheduler.run, interrupt=scheduler.interrupt),
        Chore("retirement", RETIREMENT_SECONDS, lambda: retire_models(database)),
        Chore("federations", FEDERATION_SECONDS, lambda: settle_federations(database)),
        Chore("webhooks", WEBHOOK_SECONDS, courier.run, interrupt=courier.close),
        Chore("sweep", HOUR_SECONDS, lambda: _sweep(database, blobs), AFTER_START_SECONDS),
        Chore("logs", HOUR_SECONDS, lambda: _rescue_logs(database, blobs), AFTER_START_SECONDS),
        Chore("uploads", HOUR_SECONDS, lambda: _expire_uploads(database, blobs), AFTER_START_SECONDS),
        Chore("idempotency", HOUR_SECONDS, lambda: _forget_keys(database), AFTER_START_SECONDS),
        Chore("deliveries", HOUR_SECONDS, lambda: _forget_deliveries(database), AFTER_START_SECONDS),
    ]


def _sweep(database: Database, blobs: BlobStore) -> None:
    report = sweep_blobs(database, blobs)
    _log.info("swept", scanned=report.scanned, deleted=len(report.deleted), bytes_freed=report.bytes_freed)


def _rescue_logs(database: Database, blobs: BlobStore) -> None:
    rescued = rescue_logs(database, blobs)
    if rescued:
        _log.info("logs_rescued", attempts=rescued)


def _expire_uploads(database: Database, blobs: BlobStore) -> None:
    expired = 0
    try:
        while True:
            with database.write() as session:
                batch, digests = uploads.expire(session)
            expired += batch
            _remove_each(database, blobs, digests)
            if not batch:
                break
    finally:
        if expired:
            _log.info("uploads_expired", uploads=expired)


def _remove_each(database: Database, blobs: BlobStore, digests: Sequence[str]) -> None:
    """Remove the blobs that no row names any more. What can not be removed is left to the sweep, a day later.

    Raises:
        DatabaseUnavailable, BlobStoreUnavailable: the first failure, when the others have had their turn, or when
            there were so many that the store is away.
    """
    failures: list[RankwiseError] = []
    for digest in digests:
        try:
            remove_unused(database, blobs, digest)
        except (DatabaseUnavailable, BlobStoreUnavailable) as error:
            _log.warning("blob_not_removed", sha256=digest, error=error.detail)
            failures.append(error)
            if len(failures) == MOST_FAILURES:
                break
    if failures:
        raise failures[0]


def _forget_keys(database: Database) -> None:
    with database.write() as session:
        dropped = idempotency.forget(session)
    if dropped:
        _log.info("idempotency_keys_forgotten", keys=dropped)


def _forget_deliveries(database: Database) -> None:
    forgotten = 0
    while True:  # a batch a transaction, so that nobody waits long for the database
        with database.write() as session:
            batch = deliveries.forget_deliveries(session)
        forgotten += batch
        if not batch:
            break
    if forgotten:
        _log.info("webhook_deliveries_forgotten", deliveries=forgotten)
