"""What depends on a base model, and so keeps it from being removed.

Looked at in the order in which one becomes the other, a schedule a job and a job an adapter: what does so meanwhile is
seen at one place at least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, and_, exists, func, or_, select, text
from sqlalchemy.orm import Session, aliased

from storage.ids import is_id
from storage.tables import (
    AdapterRow,
    AdapterWaiverRow,
    AliasRow,
    JobRow,
    ModelRow,
    ScheduleRow,
    TransferableRow,
    TransferRow,
)

LISTED = 20
_UNFINISHED = text("jobs.state IN ('queued', 'running', 'cancelling')")


@dataclass(frozen=True, slots=True)
class Dependent:
    """One thing that depends on the model: `collection` and `id` are its path, and `reason` says why."""

    collection: str
    id: str
    reason: str


@dataclass(slots=True)
class Dependents:
    """How many there are of each kind, and the first of them all.

    Attributes:
        counts: collection → number; only of those that there are.
        first: at most `LISTED`.
    """

    counts: dict[str, int] = field(default_factory=dict)
    first: list[Dependent] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def count(self, collection: str, number: int = 1) -> None:
        if number:
            self.counts[collection] = self.counts.get(collection, 0) + number

    def add(self, dependent: Dependent) -> None:
        self.count(dependent.collection)
        self.list(dependent)

    def list(self, dependent: Dependent) -> None:
        if len(self.first) < LISTED:
            self.first.append(dependent)

    def words(self) -> str:
        """The counts in a line: "2 adapters, 1 job"."""
        return ", ".join(f"{number} {_one(name) if number == 1 else name}" for name, number in self.counts.items())


def _one(collection: str) -> str:
    return collection.removesuffix("es") if collection == "aliases" else collection[:-1]


def dependents_of(session: Session, model: ModelRow) -> Dependents:
    """Everything that keeps `model` from being removed.

    * an enabled schedule whose job loads it, goes to it, or moves one adapter of it. One that moves whatever adapters
      are still on it does not: those adapters are counted themselves;
    * an unfinished job of the same kind;
    * an adapter of it that has no published transfer to another base model, and no waiver;
    * an alias that points to one of its adapters, moved or waived as that may be: it is served.
    """
    found = Dependents()
    names = frozenset({model.id, model.name, model.location})
    for look in (_schedules, _jobs, _adapters, _aliases):
        look(session, model, names, found)
    return found


def adapters_of(model: ModelRow) -> ColumnElement[bool]:
    """The adapters that belong to `model`: by its id, or while nothing else is known by its name or location."""
    named = and_(AdapterRow.model_id.is_(None), AdapterRow.base_model.in_({model.name, model.location}))
    if model.revision is not None:
        same = or_(AdapterRow.base_model_revision.is_(None), AdapterRow.base_model_revision == model.revision)
        named = and_(named, same)
    return and_(AdapterRow.deleted_at.is_(None), or_(AdapterRow.model_id == model.id, named))


def has_moved_from(model_id: str) -> ColumnElement[bool]:
    """Whether a transfer of the adapter to another base model than this was published, and is there still."""
    return _moved(TransferRow.target_model != model_id)


def has_moved_to(model_id: str) -> ColumnElement[bool]:
    """Whether a transfer of the adapter to this base model was published, and is there still."""
    return _moved(TransferRow.target_model == model_id)


def _moved(target: ColumnElement[bool]) -> ColumnElement[bool]:
    new = aliased(AdapterRow)
    return exists().where(
        TransferRow.adapter_id == AdapterRow.id, target, new.id == TransferRow.new_adapter, new.deleted_at.is_(None)
    )


def _adapters(session: Session, model: ModelRow, names: frozenset[str], found: Dependents) -> None:
    del names
    waived = exists().where(AdapterWaiverRow.adapter_id == AdapterRow.id)
    bound = and_(adapters_of(model), ~has_moved_from(model.id), ~waived)
    found.count("adapters", session.scalar(select(func.count()).select_from(AdapterRow).where(bound)) or 0)
    first = select(AdapterRow.id).where(bound).order_by(AdapterRow.created_at, AdapterRow.id).limit(LISTED)
    for adapter_id in session.scalars(first):
        found.list(Dependent("adapters", adapter_id, "has no published transfer to another base model, and no waiver"))


def _aliases(session: Session, model: ModelRow, names: frozenset[str], found: Dependents) -> None:
    del names
    statement = select(AliasRow.name).join(AdapterRow, AdapterRow.id == AliasRow.adapter_id).where(adapters_of(model))
    for name in session.scalars(statement.order_by(AliasRow.created_at, AliasRow.name)):
        found.add(Dependent("aliases", name, "points to an adapter of it"))


def _jobs(session: Session, model: ModelRow, names: frozenset[str], found: Dependents) -> None:
    statement = (
        select(JobRow.id, JobRow.kind, JobRow.affinity, JobRow.params)
        .where(_UNFINISHED)
        .order_by(JobRow.created_at, JobRow.id)
    )
    belongs = _membership(session, model)
    for job_id, kind, affinity, params in session.execute(statement).all():
        if affinity == model.id or _needs(kind, params, names, belongs):
            found.add(Dependent("jobs", job_id, f"is unfinished, a {kind} that needs it"))


def _schedules(session: Session, model: ModelRow, names: frozenset[str], found: Dependents) -> None:
    statement = (
        select(ScheduleRow.id, ScheduleRow.job_kind, ScheduleRow.job_params)
        .where(ScheduleRow.deleted_at.is_(None), ScheduleRow.enabled.is_(True))
        .order_by(ScheduleRow.created_at, ScheduleRow.id)
    )
    belongs = _membership(session, model)
    for schedule_id, kind, params in session.execute(statement).all():
        if _needs(kind, params, names, belongs):
            found.add(Dependent("schedules", schedule_id, f"is enabled, and its {kind} needs it"))


def _membership(session: Session, model: ModelRow) -> Callable[[str], bool]:
    """Whether the adapter with an id belongs to the model, or its discriminator does; each is looked up once."""
    known: dict[str, bool] = {}

    def belongs(adapter_id: str) -> bool:
        if adapter_id not in known:
            statement = select(AdapterRow.id).where(AdapterRow.id == adapter_id, adapters_of(model))
            kept = session.get(TransferableRow, adapter_id)
            screened = kept is not None and kept.discriminator_base.get("model_id") == model.id
            known[adapter_id] = screened or session.scalar(statement) is not None
        return known[adapter_id]

    return belongs


def _needs(kind: str, params: Any, names: frozenset[str], belongs: Callable[[str], bool]) -> bool:
    """A transfer needs the bases of the adapter that it moves and of its discriminator; a merge needs none."""
    texts = set(_texts(params))
    if texts & names:
        return True
    return kind == "transfer" and any(belongs(value) for value in texts if is_id(value, "adp"))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
