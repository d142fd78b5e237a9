"""Which adapters a fleet is made of: those of one base model, narrowed by owner, tags, name and what they keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, exists, func, select
from sqlalchemy.orm import Session

from storage import models
from storage.adapter_names import has_part
from storage.dependents import adapters_of, has_moved_to
from storage.tables import AdapterRow, AdapterTagRow, TransferableRow
from storage.text import fold


@dataclass(frozen=True, slots=True)
class Selector:
    """All of it must hold; None does not narrow.

    Attributes:
        base_model: id of the base model that they belong to.
        owner: id of the API key that made them.
        tags: each of them.
        name: part of the name, whatever the case.
        transferable: whether they keep a discriminator and seeds.
        without_transfer_to: id of a base model to which they have no published transfer.
    """

    base_model: str
    owner: str | None = None
    tags: tuple[str, ...] = ()
    name: str | None = None
    transferable: bool | None = None
    without_transfer_to: str | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """An adapter of a fleet. `digest` is that of its weights and effective configuration."""

    id: str
    name: str
    digest: str


def choose(session: Session, selector: Selector, limit: int) -> list[Chosen]:
    """At most `limit` of the adapters, the oldest first.

    Raises:
        NotFound: there is no such base model.
    """
    statement = select(AdapterRow.id, AdapterRow.name, AdapterRow.identity_digest).where(
        *_conditions(session, selector)
    )
    rows = session.execute(statement.order_by(AdapterRow.created_at, AdapterRow.id).limit(limit))
    return [Chosen(*row) for row in rows]


def count(session: Session, selector: Selector) -> int:
    """How many there are. Raises NotFound."""
    return session.scalar(select(func.count()).select_from(AdapterRow).where(*_conditions(session, selector))) or 0


def _conditions(session: Session, selector: Selector) -> Sequence[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = [adapters_of(models.get_model(session, selector.base_model))]
    if selector.owner is not None:
        found.append(AdapterRow.created_by == selector.owner)
    found += [
        exists().where(AdapterTagRow.adapter_id == AdapterRow.id, AdapterTagRow.tag == tag) for tag in selector.tags
    ]
    if selector.name is not None:
        sqlite = session.get_bind().dialect.name == "sqlite"
        found.append(has_part(AdapterRow.name_folded, fold(selector.name), sqlite=sqlite))
    if selector.transferable is not None:
        keeps = exists().where(TransferableRow.adapter_id == AdapterRow.id)
        found.append(keeps if selector.transferable else ~keeps)
    if selector.without_transfer_to is not None:
        found.append(~has_moved_to(selector.without_transfer_to))
    return found
