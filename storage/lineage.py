"""How adapters came from each other, in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session, defer

from artifacts.errors import NotFound
from storage.tables import AdapterRow, LineageRow
from storage.text import is_storable

MAX_NODES = 1000


@dataclass(frozen=True, slots=True)
class Lineage:
    """A graph of adapters, deleted ones included.

    Attributes:
        nodes: the adapter itself, all it was made from and all that was made from it, oldest first. Their
            `modules` are not loaded.
        edges: the steps between these nodes, each with its job and recipe, oldest child first.
        truncated: whether the graph has more than 1000 nodes; the nearest are there.
    """

    nodes: tuple[AdapterRow, ...]
    edges: tuple[LineageRow, ...]
    truncated: bool


def lineage(session: Session, adapter_id: str) -> Lineage:
    """Ancestors and descendants of an adapter (not its siblings).

    Raises:
        NotFound: no such adapter; a deleted one keeps its lineage.
    """
    if not is_storable(adapter_id) or session.get(AdapterRow, adapter_id) is None:
        raise NotFound(f"there is no adapter {adapter_id!r}")
    ancestors = _reach(session, adapter_id, LineageRow.child_id, LineageRow.parent_id)
    descendants = _reach(session, adapter_id, LineageRow.parent_id, LineageRow.child_id)
    found = list(dict.fromkeys([adapter_id, *_interleave(ancestors, descendants)]))
    kept = found[:MAX_NODES]
    nodes = session.scalars(
        select(AdapterRow)
        .where(AdapterRow.id.in_(kept))
        .order_by(AdapterRow.created_at, AdapterRow.id)
        .options(defer(AdapterRow.modules, raiseload=True))
    ).all()
    up, down = {adapter_id, *ancestors}, {adapter_id, *descendants}
    edges = session.scalars(
        select(LineageRow)
        .where(or_(LineageRow.child_id.in_(kept), LineageRow.parent_id.in_(kept)))
        .order_by(LineageRow.child_id, LineageRow.position)
    ).all()
    inside = set(kept)
    return Lineage(
        nodes=tuple(nodes),
        edges=tuple(
            edge
            for edge in edges
            if {edge.child_id, edge.parent_id} <= inside
            and ({edge.child_id, edge.parent_id} <= up or {edge.child_id, edge.parent_id} <= down)
        ),
        truncated=len(found) > len(kept),
    )


def steps_to(session: Session, adapter_id: str) -> Sequence[LineageRow]:
    """The edges from an adapter's parents to it, in the order of its recipe."""
    return session.scalars(
        select(LineageRow).where(LineageRow.child_id == adapter_id).order_by(LineageRow.position)
    ).all()


def _reach(
    session: Session, start: str, here: InstrumentedAttribute[str], there: InstrumentedAttribute[str]
) -> list[str]:
    """All that can be reached over edges from `here` to `there`, the nearest first, a little over MAX_NODES at most.

    Level by level, one query each: so a diamond is walked once, and a wide graph is cut off near its start.
    """
    seen = {start: None}
    level: Sequence[str] = [start]
    while level and len(seen) <= MAX_NODES:
        reached = session.scalars(select(there).where(here.in_(level)).distinct().order_by(there).limit(MAX_NODES + 1))
        level = [identifier for identifier in reached if identifier not in seen]
        seen.update(dict.fromkeys(level))
    return list(seen)[1:]


def _interleave(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Both in turns, so that neither direction is cut off for the other."""
    mixed = [item for pair in zip(first, second, strict=False) for item in pair]
    return [*mixed, *first[len(second) :], *second[len(first) :]]
