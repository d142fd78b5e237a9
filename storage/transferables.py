"""What an adapter keeps of its training so that it can be moved to other base models: seeds and a discriminator.

The discriminator tells by construction whether an input was in the training data: it is no adapter that anybody lists
or downloads, and goes with its adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from artifacts.manifest import FileEntry
from storage import database
from storage.blob_rows import reserve_blobs
from storage.tables import AdapterRow, TransferableFileRow, TransferableRow
from storage.text import is_storable, storable
from storage.unfinished import ADAPTER_ID, jobs_by_input


@dataclass(frozen=True, slots=True)
class Transferable:
    """What is kept beside an adapter; see `storage.transfer_tables.TransferableRow`.

    Attributes:
        files: of the discriminator, a PEFT directory.
        discriminator_digest: of its weights and effective configuration (`artifacts.content.identity_digest`).
        discriminator_base: {model_id, weights_digest, tokenizer_digest}.
    """

    seeds: tuple[str, ...]
    task: str
    prompt_format: Mapping[str, Any]
    size: int
    recipe: Mapping[str, Any]
    files: tuple[FileEntry, ...]
    discriminator_digest: str
    discriminator_base: Mapping[str, Any]
    auc: float
    settings: Mapping[str, Any]


def add(session: Session, adapter_id: str, kept: Transferable) -> bool:
    """Keep it with the adapter; the blobs of the files must be in the store already.

    What an adapter has already stays, as adapters do, and False is returned: transfers may be under way with it.

    Raises:
        RequestInvalid: a text that can not be stored.
    """
    adapter = select(AdapterRow.id).where(AdapterRow.id == adapter_id).with_for_update()
    session.scalars(adapter).one()  # two that publish the same adapter come one after the other
    if session.get(TransferableRow, adapter_id, populate_existing=True) is not None:
        return False
    reserve_blobs(session, kept.files)
    session.add(
        TransferableRow(
            adapter_id=adapter_id,
            seeds=[storable(seed, f"/seeds/{position}") for position, seed in enumerate(kept.seeds)],
            task=storable(kept.task, "/task", 200),
            prompt_format=dict(kept.prompt_format),
            size=kept.size,
            recipe=dict(kept.recipe),
            discriminator_digest=kept.discriminator_digest,
            discriminator_base=dict(kept.discriminator_base),
            auc=kept.auc,
            settings=dict(kept.settings),
            created_at=database.now(session),
            files=[
                TransferableFileRow(
                    path=storable(file.path, "/file", 300),
                    sha256=file.sha256,
                    size=file.size,
                    media_type=storable(file.media_type, "/media_type", 100),
                )
                for file in kept.files
            ],
        )
    )
    session.flush()
    return True


def get(session: Session, adapter_id: str) -> TransferableRow | None:
    """What is kept with the adapter, with the discriminator's files; also of a deleted one that a job still needs."""
    return session.get(TransferableRow, adapter_id) if is_storable(adapter_id) else None


def files_of(row: TransferableRow) -> tuple[FileEntry, ...]:
    """The files of the discriminator."""
    return tuple(FileEntry(file.path, file.sha256, file.size, file.media_type) for file in row.files)


def drop(session: Session, adapter_ids: Sequence[str]) -> None:
    """Forget what is kept with these adapters; the discriminators' blobs go with the next sweep."""
    session.execute(delete(TransferableFileRow).where(TransferableFileRow.adapter_id.in_(adapter_ids)))
    session.execute(delete(TransferableRow).where(TransferableRow.adapter_id.in_(adapter_ids)))


def drop_with_adapter(session: Session, adapter_id: str) -> None:
    """The adapter is being deleted: forget what is kept with it, unless an unfinished job names the adapter. Then the
    sweep does it, when that job has ended.
    """
    if session.get(TransferableRow, adapter_id) is not None and adapter_id not in jobs_by_input(session, ADAPTER_ID):
        drop(session, [adapter_id])


def drop_unneeded(session: Session) -> None:
    """Forget what is kept with deleted adapters that no unfinished job names."""
    deleted = session.scalars(
        select(TransferableRow.adapter_id)
        .join(AdapterRow, AdapterRow.id == TransferableRow.adapter_id)
        .where(AdapterRow.deleted_at.is_not(None))
    ).all()
    if deleted:
        needed = jobs_by_input(session, ADAPTER_ID)
        drop(session, [identifier for identifier in deleted if identifier not in needed])
