"""Whether adapters can be merged, from what the database knows of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy.orm import Session

from app.schemas.merge import CompareMergesParams, MergeAdapter, MergeParams
from app.settings import Settings
from app.stored_inputs import stored_adapters
from artifacts.base_model import BaseModelRef
from artifacts.pointers import pointers_below
from merge.catalog import parse_parameters
from merge.plan import MergeInput, plan_merge
from storage import adapters

UNKNOWN_BASE = "unknown"


def check_merge(_: Settings, session: Session, request: MergeParams, devices: int) -> None:
    """Refuse a merge that can not be done. It works on the factors alone: it loads no base model.

    Raises:
        RequestInvalid and its kin: see `merge_inputs`, `merge.plan.plan_merge`.
    """
    del devices
    options = parse_parameters(request.method, request.parameters)
    plan_merge(merge_inputs(session, request.adapters), request.method, options)


def check_merges(_: Settings, session: Session, request: CompareMergesParams, devices: int) -> None:
    """As `check_merge`, for every candidate; findings about one point below `/candidates/{its position}`."""
    del devices
    options = []
    for position, item in enumerate(request.candidates):
        with _of_candidate(position):
            options.append(parse_parameters(item.method, item.parameters))
    inputs = merge_inputs(session, request.adapters)
    for position, (item, found) in enumerate(zip(request.candidates, options, strict=True)):
        with _of_candidate(position):
            plan_merge(inputs, item.method, found)


@contextmanager
def _of_candidate(position: int) -> Iterator[None]:
    """Findings about a candidate point to the one that they are about; those about adapters stay as they are."""
    place = f"/candidates/{position}"
    with pointers_below(f"{place}/method", "/method"), pointers_below(f"{place}/parameters", "/parameters"):
        yield


def merge_inputs(session: Session, requested: Sequence[MergeAdapter]) -> list[MergeInput]:
    """One input for each requested adapter, in their order.

    Raises:
        RequestInvalid: an id that names no adapter, or a deleted one; all of them are listed.
    """
    named = [(f"/adapters/{position}/id", item.id) for position, item in enumerate(requested)]
    found = stored_adapters(session, named)
    inputs: list[MergeInput] = []
    for item in requested:
        row = found[item.id]
        manifest = adapters.manifest_of(row)
        inputs.append(
            MergeInput(
                id=row.id,
                name=row.name,
                digest=row.weights_digest,
                modules=manifest.modules,
                method=row.method,
                mergeable=row.mergeable,
                refusal=row.refusal,
                base=adapters.base_of(session, row) or BaseModelRef.named(UNKNOWN_BASE),
                weight=item.weight,
            )
        )
    return inputs
