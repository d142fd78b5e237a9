"""The rows that tell which blobs are about to be used, so that nobody takes them away meanwhile."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import ColumnElement, case, update
from sqlalchemy.orm import Session

from artifacts.manifest import FileEntry
from storage import database
from storage.tables import BlobRow
from storage.text import storable
from storage.upsert import dialect_insert


def reserve_blobs(session: Session, files: Iterable[FileEntry]) -> None:
    """Protect these blobs from the sweep for its next 24 hours, whether they are in the store yet or not.

    Commit this before putting the bytes, and no sweep can take away a blob between the moment it was found in the
    store and the transaction that refers to it: the sweep locks these rows while it deletes.

    Nor does `sweep.remove_unused`, which does not wait for 24 hours: it leaves a blob with a reservation that was not
    ended. What is to be removable by it again ends each of its reservations, by `use_reserved` or `end_reservation`.
    """
    _protect(session, files, first=1, then=BlobRow.reservations + 1)


def use_reserved(session: Session, files: Iterable[FileEntry]) -> None:
    """The blobs were reserved and put, and this transaction refers to them: ends one reservation of each.

    A row that the sweep has removed is made again, so that there is something to refer to.
    """
    _protect(session, files, first=0, then=_one_less())


def end_reservation(session: Session, sha256: str) -> bool:
    """End one reservation of a blob; False: its row is not there any more, and so its bytes may not be.

    The row is locked until the transaction ends: nobody can take the blob away before a reference to it is committed.
    """
    ended = update(BlobRow).where(BlobRow.sha256 == sha256).values(reservations=_one_less()).returning(BlobRow.sha256)
    return session.scalar(ended.execution_options(synchronize_session=False)) is not None


def _protect(session: Session, files: Iterable[FileEntry], *, first: int, then: ColumnElement[int]) -> None:
    sizes = {storable(file.sha256, "/sha256", 64): file.size for file in files}
    if not sizes:
        return
    moment = database.now(session)
    # in one order for all, so that two reservations can not deadlock
    values = [
        {"sha256": digest, "size": sizes[digest], "created_at": moment, "reservations": first}
        for digest in sorted(sizes)
    ]
    statement = dialect_insert(session, BlobRow).values(values)
    renewed = {"created_at": statement.excluded.created_at, "reservations": then}
    session.execute(statement.on_conflict_do_update(index_elements=["sha256"], set_=renewed))


def _one_less() -> ColumnElement[int]:
    return case((BlobRow.reservations > 0, BlobRow.reservations - 1), else_=0)
