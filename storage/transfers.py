"""Transfers: on record with their jobs, found again by what they do, judged, and decided on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from artifacts.errors import NotFound, StateConflict
from artifacts.manifest import AdapterManifest, FileEntry
from storage import adapters, checkpoints, database
from storage.pagination import DEFAULT_LIMIT, Page, page_of
from storage.tables import AdapterRow, HeldFileRow, JobRow, SealedInputRow, TransferRow
from storage.text import is_storable, storable

Verdict = Literal["pass", "hold", "fail"]
Decision = Literal["publish", "discard"]
_AGAIN = ("failed", "cancelled")


@dataclass(frozen=True, slots=True)
class TransferFacts:
    """What is known of a transfer when it is submitted.

    Attributes:
        key: of all that decides the new adapter (`transfer.identity`).
        request_key: of that, and of how it is measured and judged: two requests of one are one transfer.
        source_model, target_model: ids.
    """

    key: str
    request_key: str
    adapter_id: str
    adapter_name: str
    source_model: str
    target_model: str
    method: str
    seeds_digest: str | None = None


@dataclass(frozen=True, slots=True)
class HeldAdapter:
    """An adapter that waits for a decision; its blobs are in the store. `parents` is JSON: [id, recipe] each."""

    manifest: AdapterManifest
    name: str
    description: str
    tags: tuple[str, ...]
    base_model: str | None
    model_id: str | None
    parents: tuple[adapters.Parent, ...]


@dataclass(frozen=True, slots=True)
class TransferFilter:
    """Which transfers to list; None does not filter. `state` is that of the job."""

    adapter_id: str | None = None
    source_model: str | None = None
    target_model: str | None = None
    schedule_id: str | None = None
    verdict: str | None = None
    state: str | None = None


def find_same(session: Session, request_key: str) -> tuple[TransferRow, JobRow] | None:
    """The transfer that does the same, with its job; None if there is none.

    Whoever is going to make one holds a lock of the source adapter, so that no other comes between.
    """
    found = session.execute(
        select(TransferRow, JobRow)
        .join(JobRow, JobRow.id == TransferRow.job_id)
        .where(TransferRow.request_key == request_key, TransferRow.superseded_by.is_(None))
        .execution_options(populate_existing=True)
    ).one_or_none()
    return None if found is None else (found[0], found[1])


def may_be_repeated(job: JobRow) -> bool:
    """Whether a transfer that does the same as this job's shall be made: this one came to nothing."""
    return job.state in _AGAIN


def add_transfer(session: Session, job: JobRow, facts: TransferFacts, instead_of: TransferRow | None = None) -> None:
    """Put the transfer of a new job on record.

    Args:
        instead_of: one that failed or was cancelled: the job goes on from its stage outputs, while they are kept.
    """
    if instead_of is not None:
        instead_of.superseded_by = job.id
        session.flush()
        checkpoints.take_over(session, job.id, instead_of.job_id)
    values = asdict(facts)
    values["adapter_name"] = storable(facts.adapter_name, "/adapter", 200)
    session.add(
        TransferRow(
            job_id=job.id, **values, schedule_id=job.schedule_id, degraded=False, created_at=database.now(session)
        )
    )
    session.flush()


def sealed_of(session: Session, adapter_id: str, seeds_digest: str) -> dict[str, Any] | None:
    """The confidential inputs of a transfer of that adapter with those seeds, while they are kept: for its checks."""
    return session.scalars(
        select(SealedInputRow.document)
        .join(TransferRow, TransferRow.job_id == SealedInputRow.job_id)
        .where(
            TransferRow.adapter_id == adapter_id,
            TransferRow.seeds_digest == seeds_digest,
            SealedInputRow.document.is_not(None),
        )
        .limit(1)
    ).first()


def get_transfer(session: Session, job_id: str, *, lock: bool = False) -> TransferRow:
    """Raises NotFound."""
    row = None
    if is_storable(job_id):
        statement = select(TransferRow).where(TransferRow.job_id == job_id)
        if lock:
            statement = statement.with_for_update()
        row = session.scalars(statement.execution_options(populate_existing=True)).one_or_none()
    if row is None:
        raise NotFound(f"there is no transfer {job_id!r}", hint="GET /transfers lists those that are there.")
    return row


def list_transfers(
    session: Session, filters: TransferFilter, cursor: str | None = None, limit: int = DEFAULT_LIMIT
) -> Page[TransferRow]:
    """Newest first.

    Raises:
        RequestInvalid: a bad cursor or limit.
    """
    statement = select(TransferRow)
    asked = asdict(filters)
    for name, value in asked.items():
        if value is None:
            continue
        if name == "state":
            statement = statement.where(exists().where(JobRow.id == TransferRow.job_id, JobRow.state == value))
        else:
            statement = statement.where(getattr(TransferRow, name) == storable(value, f"/{name}"))
    return page_of(
        session, statement, (TransferRow.created_at, TransferRow.job_id), filters=asked, cursor=cursor, limit=limit
    )


def jobs_of(session: Session, rows: Sequence[TransferRow]) -> dict[str, JobRow]:
    """The jobs of transfers by id."""
    found = session.scalars(select(JobRow).where(JobRow.id.in_([row.job_id for row in rows])))
    return {job.id: job for job in found}


def record_end(
    session: Session,
    job_id: str,
    verdict: Verdict,
    *,
    degraded: bool,
    new_adapter: str | None = None,
    held: HeldAdapter | None = None,
) -> None:
    """How the transfer was judged: part of the transaction that publishes what its job gives."""
    row = get_transfer(session, job_id, lock=True)
    row.verdict, row.degraded, row.new_adapter = verdict, degraded, new_adapter
    if held is not None:
        row.held = _document(held)
        adapters.reserve_blobs(session, held.manifest.files)
        session.add_all(HeldFileRow(job_id=job_id, **asdict(entry)) for entry in held.manifest.files)
    session.flush()


def decide(session: Session, job_id: str, decision: Decision, *, by: str | None, reason: str | None) -> TransferRow:
    """Publish the adapter that waits, with its lineage, or drop it. The same decision again changes nothing.

    Args:
        by: the API key of who decides.

    Raises:
        NotFound
        StateConflict: nothing waits for a decision, or the other one was taken.
        QuotaExceeded: more bytes than the key that made it may store.
    """
    row = get_transfer(session, job_id, lock=True)
    if row.decision == decision:
        return row
    if row.decision is not None:
        raise StateConflict(
            f"{job_id} was decided on before: {row.decision}",
            hint="A decision is final. Transfer the adapter again, with another seed, for another one.",
        )
    if row.held is None:
        judged = "it is not judged yet" if row.verdict is None else f"the gate said {row.verdict}"
        raise StateConflict(
            f"nothing of {job_id} waits for a decision: {judged}",
            hint="GET /transfers?verdict=hold lists those that wait, and those that waited.",
        )
    if decision == "publish":
        job = session.get(JobRow, job_id)
        assert job is not None
        row.new_adapter = _publish(session, job, row).id
    row.held = None
    for file in list(row.files):
        session.delete(file)
    row.decision, row.decided_by, row.decided_at = decision, by, database.now(session)
    row.reason = None if reason is None else storable(reason, "/reason")
    session.flush()
    return row


def _publish(session: Session, job: JobRow, row: TransferRow) -> AdapterRow:
    held = dict(row.held or {})
    files = [FileEntry(file.path, file.sha256, file.size, file.media_type) for file in row.files]
    published, _ = adapters.add_adapter(
        session,
        adapters.manifest_from(held["manifest"], files),
        name=held["name"],
        description=held["description"],
        tags=held["tags"],
        base_model=held["base_model"],
        model_id=held["model_id"],
        origin=job.kind,
        job_id=job.id,
        created_by=job.created_by,
        parents=[adapters.Parent(parent, recipe) for parent, recipe in held["parents"]],
    )
    return published


def _document(held: HeldAdapter) -> dict[str, Any]:
    return {
        "manifest": adapters.manifest_columns(held.manifest),
        "name": held.name,
        "description": held.description,
        "tags": list(held.tags),
        "base_model": held.base_model,
        "model_id": held.model_id,
        "parents": [[parent.id, parent.recipe] for parent in held.parents],
    }


def take_over(session: Session, job: JobRow, retried: str) -> None:
    """The retry of a transfer's job is that transfer; its stage outputs come with the checkpoint.

    Raises:
        StateConflict: another job does the same by now.
    """
    old = session.get(TransferRow, retried)
    if old is None:
        return
    if old.superseded_by is not None:
        raise StateConflict(
            f"{old.superseded_by} does what {retried} was to do", hint="Retry that one, if it has failed too."
        )
    kept = {name: getattr(old, name) for name in TransferFacts.__dataclass_fields__}
    old.superseded_by = job.id
    session.flush()
    session.add(
        TransferRow(
            job_id=job.id, **kept, schedule_id=job.schedule_id, degraded=False, created_at=database.now(session)
        )
    )
    session.flush()
