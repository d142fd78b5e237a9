"""Images: add, find, list, delete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from artifacts.errors import NotFound
from artifacts.manifest import FileEntry
from storage import database
from storage.blob_rows import reserve_blobs
from storage.ids import new_id
from storage.pagination import DEFAULT_LIMIT, Page, page_of
from storage.quotas import charge_bytes
from storage.tables import ImageFileRow, ImageRow
from storage.text import is_storable, storable
from storage.tombstones import hide, lock_shown

Role = Literal["image", "mask", "picture"]


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file of an image, with what it shows: of a mask the concept and the step. `entry.path` is its name."""

    entry: FileEntry
    role: Role
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What the row of an image says, beside its files; see `ImageRow`."""

    label: str
    method: str | None
    base_model: str
    model_id: str | None
    prompt: str
    seed: int
    width: int
    height: int
    recipe: Mapping[str, Any]
    report: Mapping[str, Any]


def add_image(
    session: Session,
    facts: ImageFacts,
    files: Sequence[ImageFile],
    *,
    job_id: str,
    position: int = 0,
    created_by: str | None = None,
) -> ImageRow:
    """A new image of a job; the blobs of its files must be in the store already.

    Raises:
        QuotaExceeded: more bytes than the key that makes it may store.
        RequestInvalid: a text that can not be stored.
    """
    reserve_blobs(session, [file.entry for file in files])
    size = sum(file.entry.size for file in files)
    charge_bytes(session, created_by, size)
    row = ImageRow(
        id=new_id("img"),
        job_id=job_id,
        position=position,
        label=storable(facts.label, "/label", 200),
        method=None if facts.method is None else storable(facts.method, "/method", 40),
        base_model=storable(facts.base_model, "/base_model", 300),
        model_id=facts.model_id,
        prompt=storable(facts.prompt, "/prompt"),
        seed=facts.seed,
        width=facts.width,
        height=facts.height,
        recipe=dict(facts.recipe),
        report=dict(facts.report),
        size=size,
        created_by=created_by,
        created_at=database.now(session),
    )
    session.add(row)
    session.flush()
    session.add_all(
        ImageFileRow(
            image_id=row.id,
            name=storable(file.entry.path, "/files", 100),
            position=number,
            role=file.role,
            details=dict(file.details),
            sha256=file.entry.sha256,
            size=file.entry.size,
            media_type=storable(file.entry.media_type, "/media_type", 100),
        )
        for number, file in enumerate(files)
    )
    session.flush()
    return row


def get_image(session: Session, image_id: str) -> ImageRow:
    """The image with its files.

    Raises:
        NotFound: no such image, or it was deleted.
    """
    row = session.get(ImageRow, image_id) if is_storable(image_id) else None
    if row is None or row.deleted_at is not None:
        raise NotFound(f"there is no image {image_id!r}", hint="GET /images lists those that are there.")
    return row


def get_file(session: Session, image_id: str, name: str) -> ImageFileRow:
    """One file of an image.

    Raises:
        NotFound: no such image, or it has no such file; the hint lists what it has.
    """
    row = get_image(session, image_id)
    for file in row.files:
        if file.name == name:
            return file
    there = ", ".join(file.name for file in row.files)
    raise NotFound(f"the image {image_id} has no file {name!r}", hint=f"It has {there}.")


def list_images(
    session: Session, *, job_id: str | None = None, cursor: str | None = None, limit: int = DEFAULT_LIMIT
) -> Page[ImageRow]:
    """Those that were not deleted, newest first; of one job if that is given.

    Raises:
        RequestInvalid: a bad cursor or limit.
    """
    statement = select(ImageRow).where(ImageRow.deleted_at.is_(None))
    if job_id is not None:
        statement = statement.where(ImageRow.job_id == job_id)
    keys = (ImageRow.created_at, ImageRow.id)
    return page_of(session, statement, keys, filters={"job_id": job_id}, cursor=cursor, limit=limit)


def delete_image(session: Session, image_id: str) -> None:
    """Hide the image. Its rows and its bytes go with a later sweep.

    Raises:
        NotFound: no such image, or deleted before.
    """
    row = lock_shown(session, ImageRow, image_id)
    if row is None:
        raise NotFound(f"there is no image {image_id!r}")
    hide(session, row)
