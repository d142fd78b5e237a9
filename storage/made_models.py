"""Models that jobs made: base models whose files are in the blob store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from artifacts.base_model import BaseModelRef
from artifacts.errors import NotFound
from artifacts.manifest import FileEntry
from storage.blob_rows import reserve_blobs
from storage.models import add_model, get_model
from storage.quotas import charge_bytes, release_bytes
from storage.tables import MadeModelRow, ModelFileRow, ModelRow
from storage.text import storable

NAME_LIMIT = 300


def add_made_model(
    session: Session,
    ref: BaseModelRef,
    files: Sequence[FileEntry],
    *,
    recipe: Mapping[str, Any],
    job_id: str,
    created_by: str | None = None,
) -> ModelRow:
    """Register a model that a job made; the blobs of its files must be in the store already.

    The same weights again give the first one. A name that belongs to another model gets a number.

    Args:
        ref: its location is the digest of its weights.

    Raises:
        QuotaExceeded: more bytes than the key that makes it may store.
        RequestInvalid: a text that can not be stored.
    """
    reserve_blobs(session, files)
    row, _ = add_model(session, replace(ref, name=_free_name(session, ref)))
    if session.get(MadeModelRow, row.id) is not None:
        return row
    size = sum(file.size for file in files)
    charge_bytes(session, created_by, size)
    session.add(MadeModelRow(model_id=row.id, job_id=job_id, recipe=dict(recipe), size=size, created_by=created_by))
    session.flush()
    session.add_all(
        ModelFileRow(
            model_id=row.id,
            path=storable(file.path, "/file", 200),
            sha256=file.sha256,
            size=file.size,
            media_type=storable(file.media_type, "/media_type", 100),
        )
        for file in files
    )
    session.flush()
    return row


def made_model(session: Session, model_id: str) -> MadeModelRow | None:
    """What is known of how the model was made, with its files; None if it was registered by somebody."""
    return session.get(MadeModelRow, model_id)


def get_file(session: Session, model_id: str, name: str) -> ModelFileRow:
    """One file of a model that a job made.

    Raises:
        NotFound: no such model or file; the hint lists what is there.
    """
    found = made_model(session, get_model(session, model_id).id)
    if found is None:
        raise NotFound(f"the files of the model {model_id} are not kept here: it was registered by its place")
    for file in found.files:
        if file.path == name:
            return file
    there = ", ".join(file.path for file in found.files)
    raise NotFound(f"the model {model_id} has no file {name!r}", hint=f"It has {there}.")


def drop_removed(session: Session, cutoff: datetime) -> None:
    """Give up the files of models that were removed before `cutoff`; that they were there stays known."""
    removed = select(ModelRow.id).where(ModelRow.removed_at < cutoff)
    gone = session.scalars(select(MadeModelRow).where(MadeModelRow.model_id.in_(removed))).all()
    for row in gone:
        release_bytes(session, row.created_by, row.size)
    ids = [row.model_id for row in gone]
    session.execute(delete(ModelFileRow).where(ModelFileRow.model_id.in_(ids)))
    session.execute(delete(MadeModelRow).where(MadeModelRow.model_id.in_(ids)))


def _free_name(session: Session, ref: BaseModelRef) -> str:
    """The model's name, with a number if it belongs to a model of other weights."""
    name, number = ref.name, 1
    while True:
        other = session.scalars(select(ModelRow).where(ModelRow.name == name)).one_or_none()
        if other is None or (other.source == ref.source and other.weights_digest == ref.weights_digest):
            return name
        number += 1
        tail = f" ({number})"
        name = ref.name[: NAME_LIMIT - len(tail)] + tail
