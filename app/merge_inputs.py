"""The inputs of a merge, from what the database knows of the adapters."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

from app.schemas.merge import MergeAdapter
from artifacts.base_model import BaseModelRef
from artifacts.errors import FieldError, NotFound, RequestInvalid
from merge.plan import MergeInput
from storage import adapters

UNKNOWN_BASE = "unknown"


def merge_inputs(session: Session, requested: Sequence[MergeAdapter]) -> list[MergeInput]:
    """One input for each requested adapter, in their order.

    Raises:
        RequestInvalid: an id that names no adapter, or a deleted one; all of them are listed.
    """
    inputs: list[MergeInput] = []
    missing: list[FieldError] = []
    for position, item in enumerate(requested):
        try:
            row = adapters.get_adapter(session, item.id)
        except NotFound:
            missing.append(FieldError(f"/adapters/{position}/id", f"there is no adapter {item.id}"))
            continue
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
    if missing:
        raise RequestInvalid(
            f"{missing[0].message[0].upper()}{missing[0].message[1:]}.",
            hint="GET /adapters lists what is here.",
            errors=missing,
        )
    return inputs
