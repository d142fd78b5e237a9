"""Datasets: add (the same content once), find, delete."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import false, select
from sqlalchemy.orm import Session

from artifacts.errors import Conflict, NotFound, StateConflict
from artifacts.manifest import FileEntry
from storage import database
from storage.adapter_names import has_part
from storage.blob_rows import use_reserved
from storage.ids import new_id
from storage.pagination import DEFAULT_LIMIT, Page, page_of
from storage.quotas import charge_bytes
from storage.tables import DatasetRow, JobRow, ScheduleRow
from storage.text import fold, is_storable, storable
from storage.tombstones import hide, lock_shown
from storage.unfinished import DATASET_ID, jobs_by_input
from storage.upsert import insert_or_ignore

_TRIES = 5
LISTED = 5
"""Jobs that a message names."""


@dataclass(frozen=True, slots=True)
class DatasetFilter:
    """What a list of datasets is narrowed by; all of it must hold."""

    name: str | None = None  # a part of it, in any case
    format: str | None = None
    sha256: str | None = None


def file_entry(sha256: str, size: int) -> FileEntry:
    """The file of a dataset, as reservations take it."""
    return FileEntry("data", sha256, size, "application/octet-stream")


def add_dataset(
    session: Session,
    *,
    name: str,
    format: str,  # noqa: A002 (the column's name)
    sha256: str,
    size: int,
    rows: int,
    columns: Sequence[Mapping[str, Any]],
    tasks: Sequence[Mapping[str, Any]] = (),
    warnings: Sequence[str] = (),
    created_by: str | None = None,
) -> tuple[DatasetRow, bool]:
    """Store what is known of a file; its blob must be in the store already.

    A live dataset of the same file and format is returned as it is, with False; its name does not change. Two calls at
    once give one row: the later one waits for the earlier transaction.

    Args:
        columns, tasks: JSON objects, as the table keeps them.

    Raises:
        QuotaExceeded: a new dataset, and more bytes than the key that makes it may store.
        RequestInvalid: a text that can not be stored.
    """
    use_reserved(session, [file_entry(sha256, size)])
    values: dict[str, Any] = {
        "id": new_id("dat"),
        "name": storable(name, "/name", 200),
        "name_folded": fold(name),
        "format": storable(format, "/format", 16),
        "sha256": sha256,
        "size": size,
        "rows": rows,
        "columns": list(columns),
        "tasks": list(tasks),
        "warnings": list(warnings),
        "created_by": created_by,
        "created_at": database.now(session),
    }
    for _ in range(_TRIES):
        added = insert_or_ignore(session, DatasetRow, values).returning(DatasetRow.id)
        if session.scalar(added) is not None:
            charge_bytes(session, created_by, size)
            return get_dataset(session, values["id"]), True
        same = session.scalars(
            select(DatasetRow)
            .where(DatasetRow.sha256 == sha256, DatasetRow.format == format, DatasetRow.deleted_at.is_(None))
            .execution_options(populate_existing=True)
        ).one_or_none()
        if same is not None:
            return same, False
        # it was deleted between the two statements: try to add again
    raise Conflict("the same dataset is being added and deleted over and over", hint="Try again.")


def get_dataset(session: Session, dataset_id: str, *, lock: bool = False) -> DatasetRow:
    """The dataset.

    Args:
        lock: keep it from being deleted until the transaction ends: for whoever makes a job that needs it.

    Raises:
        NotFound: no such dataset, or it was deleted.
    """
    row = None
    if is_storable(dataset_id):
        live = select(DatasetRow).where(DatasetRow.id == dataset_id, DatasetRow.deleted_at.is_(None))
        statement = live.with_for_update(read=True) if lock else live
        row = session.scalars(statement.execution_options(populate_existing=True)).one_or_none()
    if row is None:
        raise NotFound(f"there is no dataset {dataset_id!r}", hint="GET /datasets lists those that are there.")
    return row


def list_datasets(
    session: Session,
    filters: DatasetFilter = DatasetFilter(),
    *,
    cursor: str | None = None,
    limit: int = DEFAULT_LIMIT,
) -> Page[DatasetRow]:
    """Those that were not deleted, newest first.

    Raises:
        RequestInvalid: a bad cursor or limit.
    """
    statement = select(DatasetRow).where(DatasetRow.deleted_at.is_(None))
    if filters.name is not None:
        sqlite = session.get_bind().dialect.name == "sqlite"
        # no name has in it what can not be stored
        storable_part = is_storable(filters.name)
        part = has_part(DatasetRow.name_folded, fold(filters.name), sqlite=sqlite) if storable_part else false()
        statement = statement.where(part)
    if filters.format is not None:
        statement = statement.where(DatasetRow.format == filters.format)
    if filters.sha256 is not None:
        statement = statement.where(DatasetRow.sha256 == filters.sha256)
    asked = {"name": filters.name, "format": filters.format, "sha256": filters.sha256}
    keys = (DatasetRow.created_at, DatasetRow.id)
    return page_of(session, statement, keys, filters=asked, cursor=cursor, limit=limit)


def delete_dataset(session: Session, dataset_id: str) -> None:
    """Hide the dataset. Its row and its bytes go with a later sweep.

    Raises:
        NotFound: no such dataset, or deleted before.
        StateConflict: jobs that wait or run need it.
    """
    row = lock_shown(session, DatasetRow, dataset_id)
    if row is None:
        raise NotFound(f"there is no dataset {dataset_id!r}")
    needed = jobs_by_input(session, DATASET_ID).get(dataset_id, [])
    if needed:
        listed = ", ".join(needed[:LISTED]) + (" …" if len(needed) > LISTED else "")
        raise StateConflict(
            f"{len(needed)} unfinished jobs need the dataset {row.name!r}: {listed}",
            hint="Wait until they have ended, or cancel them.",
        )
    hide(session, row)


def users_of(session: Session, dataset_id: str, without: str | None = None) -> list[str]:
    """Ids of the unfinished jobs and of the schedules that name the dataset.

    Args:
        without: a job that does not count.
    """
    found = [job_id for job_id in jobs_by_input(session, DATASET_ID).get(dataset_id, []) if job_id != without]
    planned = session.execute(
        select(ScheduleRow.id, ScheduleRow.job_params).where(ScheduleRow.deleted_at.is_(None)).order_by(ScheduleRow.id)
    )
    return found + [schedule_id for schedule_id, params in planned if dataset_id in json.dumps(params)]


def dropping_job(session: Session, dataset_id: str) -> str | None:
    """The unfinished job that removes the dataset when it succeeds, if there is one."""
    for job_id in jobs_by_input(session, DATASET_ID).get(dataset_id, []):
        job = session.get(JobRow, job_id)
        asked = job.params.get("transferable") if job is not None else None
        if isinstance(asked, dict) and asked.get("drop_dataset"):
            return job_id
    return None


def remove_dataset(session: Session, dataset_id: str) -> list[str]:
    """Take the dataset away at once, with earlier deleted ones of the same file; nobody may need it any more.

    Returns:
        The digest of its file, whose blob nobody needs; none if it was deleted before.
    """
    row = lock_shown(session, DatasetRow, dataset_id)
    if row is None:
        return []
    hide(session, row)
    sha256 = row.sha256
    needed = jobs_by_input(session, DATASET_ID)
    same = session.scalars(select(DatasetRow).where(DatasetRow.sha256 == sha256, DatasetRow.deleted_at.is_not(None)))
    for gone in same.all():
        if gone.id == dataset_id or gone.id not in needed:
            session.delete(gone)
    session.flush()
    return [sha256]
