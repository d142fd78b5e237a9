"""The rows that tell the sweep which blobs are about to be used."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy.orm import Session

from artifacts.manifest import FileEntry
from storage import database
from storage.tables import BlobRow
from storage.text import storable
from storage.upsert import insert_or_update


def reserve_blobs(session: Session, files: Iterable[FileEntry]) -> None:
    """Protect these blobs from the sweep for its next 24 hours, whether they are in the store yet or not.

    Commit this before putting the bytes, and no sweep can take away a blob between the moment it was found in the
    store and the transaction that refers to it: the sweep locks these rows while it deletes.
    """
    sizes = {storable(file.sha256, "/sha256", 64): file.size for file in files}
    if not sizes:
        return
    moment = database.now(session)
    # in one order for all, so that two reservations can not deadlock
    values = [{"sha256": digest, "size": sizes[digest], "created_at": moment} for digest in sorted(sizes)]
    session.execute(insert_or_update(session, BlobRow, values, key="sha256", update=["created_at"]))
