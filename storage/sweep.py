"""The sweep: removes blobs that nothing refers to, and what was deleted a day ago."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import TypeVar

from sqlalchemy import ColumnElement, and_, delete, exists, select
from sqlalchemy.orm import Session

from storage import database as clock
from storage import made_models, previews, sealed_inputs, transferables
from storage.blobs import BlobInfo, BlobStore
from storage.checkpoints import drop_ended
from storage.database import Database
from storage.tables import (
    AdapterFileRow,
    AdapterKeysRow,
    AdapterRow,
    BlobRow,
    ClientUpdateRow,
    DatasetRow,
    HeldFileRow,
    ImageFileRow,
    ImageRow,
    JobAttemptRow,
    JobCheckpointRow,
    LineageRow,
    ModelFileRow,
    TransferableFileRow,
    TransferRow,
    UploadSegmentRow,
)
from storage.unfinished import ADAPTER_ID, DATASET_ID, jobs_by_input
from storage.upsert import insert_or_ignore

OLDER_THAN = timedelta(hours=24)
_BATCH = 50
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What a sweep did, or would do.

    Attributes:
        scanned: blobs in the store.
        deleted: digests of the blobs removed; `bytes_freed` is their size.
        adapters_forgotten: deleted adapters whose files were given up; rows that others descend from stay.
        datasets_forgotten, images_forgotten: deleted ones that were given up with their rows.
        staging_removed: entries of abandoned uploads.
    """

    scanned: int
    deleted: tuple[str, ...]
    bytes_freed: int
    adapters_forgotten: int
    datasets_forgotten: int
    images_forgotten: int
    staging_removed: int
    dry_run: bool


def sweep_blobs(
    database: Database, blobs: BlobStore, older_than: timedelta = OLDER_THAN, dry_run: bool = False
) -> SweepReport:
    """Mark what the database refers to, then remove the rest that is older than `older_than`.

    A blob stays if a row refers to it, if it was put or reserved lately, or if its adapter was deleted lately. Each
    one is looked at again under a lock before it is removed, so an upload at the same time loses nothing.

    Raises:
        DatabaseUnavailable, BlobStoreUnavailable
    """
    with database.read() as session:
        cutoff = clock.now(session) - older_than
        forgotten = _forgettable(session, cutoff)
        datasets = _forgettable_datasets(session, cutoff)
        images = list(session.scalars(select(ImageRow.id).where(ImageRow.deleted_at < cutoff)))
        live = _live_digests(session, cutoff, forgotten, datasets, images)
    if not dry_run:
        with database.write() as session:
            transferables.drop_unneeded(session)
            made_models.drop_removed(session, cutoff)
        _forget_adapters(database, forgotten)
        _forget_datasets(database, datasets)
        _forget_images(database, images)
        with database.write() as session:
            drop_ended(session, cutoff)
            previews.drop_ended(session, cutoff)
            sealed_inputs.drop_ended(session, cutoff)
    scanned = 0
    candidates: list[BlobInfo] = []
    for blob in blobs.iter_blobs():
        scanned += 1
        if blob.sha256 not in live and blob.modified < cutoff:
            candidates.append(blob)
    removed = candidates if dry_run else list(_remove(database, blobs, candidates, cutoff))
    if not dry_run:
        _drop_unused_rows(database, cutoff)
    return SweepReport(
        scanned=scanned,
        deleted=tuple(sorted(blob.sha256 for blob in removed)),
        bytes_freed=sum(blob.size for blob in removed),
        adapters_forgotten=len(forgotten),
        datasets_forgotten=len(datasets),
        images_forgotten=len(images),
        staging_removed=blobs.remove_stale_staging(cutoff, dry_run=dry_run),
        dry_run=dry_run,
    )


def remove_unused(database: Database, blobs: BlobStore, sha256: str) -> bool:
    """Remove one blob now, if no row refers to it and nobody has it reserved; whether it was removed.

    For what is replaced often and large, such as checkpoints: the sweep would let a day's worth of them pile up. What
    this leaves, since another is about to refer to it or died before, is left to the sweep.

    Raises:
        DatabaseUnavailable, BlobStoreUnavailable
    """
    with database.write() as session:
        free = and_(BlobRow.sha256 == sha256, BlobRow.reservations == 0)
        if not _is_locked_unused(session, free):
            return False
        blobs.delete(sha256)
        session.execute(delete(BlobRow).where(BlobRow.sha256 == sha256))
        return True


def _forgettable(session: Session, cutoff: datetime) -> list[str]:
    """Adapters deleted before `cutoff` that still have files and that no unfinished job names."""
    needed = jobs_by_input(session, ADAPTER_ID)
    deleted = session.scalars(
        select(AdapterRow.id).where(
            AdapterRow.deleted_at < cutoff,
            exists().where(AdapterFileRow.adapter_id == AdapterRow.id) | ~_has_children(),
        )
    )
    return [identifier for identifier in deleted if identifier not in needed]


def _forgettable_datasets(session: Session, cutoff: datetime) -> list[str]:
    """Datasets deleted before `cutoff` that no unfinished job names."""
    needed = jobs_by_input(session, DATASET_ID)
    deleted = session.scalars(select(DatasetRow.id).where(DatasetRow.deleted_at < cutoff))
    return [identifier for identifier in deleted if identifier not in needed]


def _live_digests(
    session: Session, cutoff: datetime, forgotten: Sequence[str], datasets: Sequence[str], images: Sequence[str]
) -> set[str]:
    gone, gone_datasets, gone_images = set(forgotten), set(datasets), set(images)
    files = session.execute(select(AdapterFileRow.adapter_id, AdapterFileRow.sha256))
    live = {sha256 for adapter_id, sha256 in files if adapter_id not in gone}
    data = session.execute(select(DatasetRow.id, DatasetRow.sha256))
    live.update(sha256 for dataset_id, sha256 in data if dataset_id not in gone_datasets)
    pictures = session.execute(select(ImageFileRow.image_id, ImageFileRow.sha256))
    live.update(sha256 for image_id, sha256 in pictures if image_id not in gone_images)
    live.update(session.scalars(select(JobCheckpointRow.sha256)))
    given = session.scalars(select(ClientUpdateRow.sha256).where(ClientUpdateRow.sha256.is_not(None)))
    live.update(digest for digest in given if digest is not None)
    live.update(session.scalars(select(TransferableFileRow.sha256)))
    live.update(session.scalars(select(HeldFileRow.sha256)))
    live.update(session.scalars(select(ModelFileRow.sha256)))
    live.update(session.scalars(select(UploadSegmentRow.sha256)))
    logs = session.scalars(select(JobAttemptRow.log_sha256).where(JobAttemptRow.log_sha256.is_not(None)))
    live.update(digest for digest in logs if digest is not None)
    live.update(session.scalars(select(BlobRow.sha256).where(BlobRow.created_at >= cutoff)))
    return live


def _forget_adapters(database: Database, forgotten: Sequence[str]) -> None:
    """Give up the files of these adapters, and the rows of those that nothing descends from, leaves first."""
    for batch in _batches(forgotten):
        with database.write() as session:
            session.execute(delete(AdapterFileRow).where(AdapterFileRow.adapter_id.in_(batch)))
    remaining = list(forgotten)
    while remaining:
        dropped: set[str] = set()
        for batch in _batches(remaining):
            with database.write() as session:
                leaves = session.scalars(select(AdapterRow.id).where(AdapterRow.id.in_(batch), ~_has_children())).all()
                transferables.drop(session, leaves)
                session.execute(delete(LineageRow).where(LineageRow.child_id.in_(leaves)))
                session.execute(delete(AdapterKeysRow).where(AdapterKeysRow.adapter_id.in_(leaves)))
                session.execute(delete(AdapterRow).where(AdapterRow.id.in_(leaves)))
                dropped.update(leaves)
        if not dropped:
            return
        remaining = [identifier for identifier in remaining if identifier not in dropped]


def _forget_datasets(database: Database, forgotten: Sequence[str]) -> None:
    for batch in _batches(forgotten):
        with database.write() as session:
            session.execute(delete(DatasetRow).where(DatasetRow.id.in_(batch)))


def _forget_images(database: Database, forgotten: Sequence[str]) -> None:
    for batch in _batches(forgotten):
        with database.write() as session:
            session.execute(delete(ImageFileRow).where(ImageFileRow.image_id.in_(batch)))
            session.execute(delete(ImageRow).where(ImageRow.id.in_(batch)))


def _remove(
    database: Database, blobs: BlobStore, candidates: Sequence[BlobInfo], cutoff: datetime
) -> Iterator[BlobInfo]:
    """Remove the candidates that nobody has taken up since they were marked."""
    for batch in _batches(sorted(candidates, key=lambda blob: blob.sha256)):
        removed: list[BlobInfo] = []
        with database.write() as session:
            for blob in batch:
                if _lock_unused(session, blob, cutoff) and blobs.delete_if_older(blob.sha256, cutoff):
                    removed.append(blob)
                    session.execute(delete(BlobRow).where(BlobRow.sha256 == blob.sha256))
        yield from removed


def _lock_unused(session: Session, blob: BlobInfo, cutoff: datetime) -> bool:
    """Lock the blob's row (made if absent, so that a reservation has to wait) and tell whether it is unused."""
    placeholder = {"sha256": blob.sha256, "size": blob.size, "created_at": blob.modified}
    session.execute(insert_or_ignore(session, BlobRow, placeholder))
    return _is_locked_unused(session, and_(BlobRow.sha256 == blob.sha256, BlobRow.created_at < cutoff))


def _is_locked_unused(session: Session, chosen: ColumnElement[bool]) -> bool:
    """Lock the chosen blob's row, if there is one, and tell whether nothing refers to it."""
    if session.scalar(select(BlobRow.sha256).where(chosen).with_for_update()) is None:
        return False
    # Another statement, which sees what the lock has waited for: on PostgreSQL the first one may not.
    return session.scalar(select(BlobRow.sha256).where(chosen, ~_is_used())) is not None


def _drop_unused_rows(database: Database, cutoff: datetime) -> None:
    """Drop rows of blobs that were reserved and never used; an object without a row is found by the next sweep."""
    with database.write() as session:
        session.execute(delete(BlobRow).where(BlobRow.created_at < cutoff, ~_is_used()))


def _is_used() -> ColumnElement[bool]:
    return (
        exists().where(AdapterFileRow.sha256 == BlobRow.sha256)
        | exists().where(DatasetRow.sha256 == BlobRow.sha256)
        | exists().where(ImageFileRow.sha256 == BlobRow.sha256)
        | exists().where(JobAttemptRow.log_sha256 == BlobRow.sha256)
        | exists().where(JobCheckpointRow.sha256 == BlobRow.sha256)
        | exists().where(ClientUpdateRow.sha256 == BlobRow.sha256)
        | exists().where(TransferableFileRow.sha256 == BlobRow.sha256)
        | exists().where(HeldFileRow.sha256 == BlobRow.sha256)
        | exists().where(ModelFileRow.sha256 == BlobRow.sha256)
        | exists().where(UploadSegmentRow.sha256 == BlobRow.sha256)
    )


def _has_children() -> ColumnElement[bool]:
    """Adapters that were made of it, or one that will be when it is decided to publish it."""
    waiting = exists().where(TransferRow.adapter_id == AdapterRow.id, TransferRow.held.is_not(None))
    return exists().where(LineageRow.parent_id == AdapterRow.id) | waiting


def _batches(items: Sequence[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, _BATCH)):
        yield batch
