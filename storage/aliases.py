"""Aliases: names that point to an adapter, are switched to another one, and keep the adapter from being deleted."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from artifacts.errors import FieldError, NotFound, PreconditionFailed, RequestInvalid, StateConflict
from storage import database
from storage.pagination import DEFAULT_LIMIT, Page, page_of
from storage.tables import AdapterRow, AliasRow, AliasSwitchRow, TransferRow
from storage.text import is_storable, storable
from storage.tombstones import lock_shown
from storage.upsert import insert_or_ignore

LISTED = 5
HISTORY = 100


def get_alias(session: Session, name: str, *, lock: bool = False) -> AliasRow:
    """Raises NotFound."""
    row = session.get(AliasRow, name, with_for_update=lock, populate_existing=lock) if is_storable(name) else None
    if row is None:
        raise NotFound(f"there is no alias {name!r}", hint="GET /aliases lists them.")
    return row


def list_aliases(session: Session, cursor: str | None = None, limit: int = DEFAULT_LIMIT) -> Page[AliasRow]:
    """Newest first.

    Raises:
        RequestInvalid: a bad cursor or limit.
    """
    keys = (AliasRow.created_at, AliasRow.name)
    return page_of(session, select(AliasRow), keys, filters={}, cursor=cursor, limit=limit)


def switches_of(session: Session, name: str) -> list[AliasSwitchRow]:
    """The last `HISTORY` switches, newest first."""
    statement = select(AliasSwitchRow).where(AliasSwitchRow.name == name)
    return list(session.scalars(statement.order_by(AliasSwitchRow.version.desc()).limit(HISTORY)))


def put_alias(
    session: Session,
    name: str,
    adapter_id: str,
    *,
    if_version: Collection[int] | None = None,
    by: str | None = None,
    job_id: str | None = None,
) -> tuple[AliasRow, bool]:
    """Have the alias point to the adapter; True with one that was made by this. The same adapter again is no switch.

    Args:
        if_version: only if its version is one of these; one that is not there yet has none.
        by: the API key that asked for it.
        job_id: the transfer that switches it.

    Raises:
        RequestInvalid: there is no such adapter.
        PreconditionFailed
    """
    if lock_shown(session, AdapterRow, adapter_id) is None:
        problem = f"there is no adapter {adapter_id}"
        raise RequestInvalid(f"T{problem[1:]}.", errors=[FieldError("/adapter", problem)])
    moment = database.now(session)
    new = {
        "name": storable(name, "/name", 100),
        "adapter_id": adapter_id,
        "version": 0,
        "created_by": by,
        "created_at": moment,
        "updated_at": moment,
    }
    made = session.scalar(insert_or_ignore(session, AliasRow, new).returning(AliasRow.name)) is not None
    row = get_alias(session, name, lock=True)
    _check_version(row, if_version)
    if not made and row.adapter_id == adapter_id:
        return row, False
    row.adapter_id, row.version, row.updated_at = adapter_id, row.version + 1, moment
    session.flush()
    session.add(
        AliasSwitchRow(
            name=name, version=row.version, adapter_id=adapter_id, job_id=job_id, created_by=by, created_at=moment
        )
    )
    session.flush()
    return row, made


def move_with(session: Session, name: str, source: str, target: str, job_id: str) -> bool:
    """A transfer has passed: switch the alias from the adapter that was moved to the new one.

    False, and nothing is changed, if the alias is gone or points to another adapter by now: somebody chose that one.
    """
    lock_shown(session, AdapterRow, target)  # in the order of all switches
    row = session.get(AliasRow, name, with_for_update=True, populate_existing=True)
    if row is None or row.adapter_id != source:
        return False
    put_alias(session, name, target, by=row.created_by, job_id=job_id)
    return True


def moved_from(session: Session, name: str) -> str | None:
    """The adapter that a transfer moved the alias away from with the last switch; None if that was no transfer's."""
    last = (
        select(AliasSwitchRow.job_id)
        .where(AliasSwitchRow.name == name)
        .order_by(AliasSwitchRow.version.desc())
        .limit(1)
    )
    return session.scalar(select(TransferRow.adapter_id).where(TransferRow.job_id == last.scalar_subquery()))


def delete_alias(session: Session, name: str, *, if_version: Collection[int] | None = None) -> None:
    """Forget the alias and its history; the adapter stays.

    Raises:
        NotFound, PreconditionFailed
    """
    row = get_alias(session, name, lock=True)
    _check_version(row, if_version)
    session.execute(delete(AliasSwitchRow).where(AliasSwitchRow.name == name))
    session.delete(row)
    session.flush()


def check_unused(session: Session, adapter_id: str) -> None:
    """Refuse to delete an adapter, which the caller has locked, that aliases point to.

    Raises:
        StateConflict
    """
    statement = select(AliasRow.name).where(AliasRow.adapter_id == adapter_id).order_by(AliasRow.name)
    names = session.scalars(statement.limit(LISTED + 1)).all()
    if names:
        listed = ", ".join(names[:LISTED]) + (" …" if len(names) > LISTED else "")
        raise StateConflict(
            f"aliases point to the adapter {adapter_id}: {listed}",
            hint="Switch them to another adapter (PUT /aliases/{name}), or delete them.",
        )


def _check_version(row: AliasRow, expected: Collection[int] | None) -> None:
    if expected is not None and row.version not in expected:
        state = f"is at version {row.version}" if row.version else "is not there"
        raise PreconditionFailed(
            f"the alias {row.name} {state}, and If-Match names another version",
            hint="Read it again, and repeat the change on what it is now.",
        )
