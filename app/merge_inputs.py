"""The inputs of a merge, from what the database knows of the adapters."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

from app.schemas.merge import MergeAdapter
from app.stored_inputs import stored_adapters
from artifacts.base_model import BaseModelRef
from merge.plan import MergeInput
from storage import adapters

UNKNOWN_BASE = "unknown"


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
