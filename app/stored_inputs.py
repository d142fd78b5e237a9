"""The adapters and datasets that a submission names."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

from artifacts.errors import FieldError, NotFound, RequestInvalid, StateConflict
from storage import adapters, datasets
from storage.tables import AdapterRow, DatasetRow


def stored_adapters(session: Session, named: Sequence[tuple[str, str]]) -> dict[str, AdapterRow]:
    """Id → adapter.

    Args:
        named: where in the request an id stands (a JSON pointer), and the id.

    Raises:
        RequestInvalid: ids that name no adapter, or a deleted one; all of them are listed.
    """
    found: dict[str, AdapterRow] = {}
    missing = []
    for pointer, adapter_id in named:
        try:
            found[adapter_id] = adapters.get_adapter(session, adapter_id)
        except NotFound:
            missing.append(FieldError(pointer, f"there is no adapter {adapter_id}"))
    if missing:
        raise RequestInvalid(f"T{missing[0].message[1:]}.", hint="GET /adapters lists what is here.", errors=missing)
    return found


def stored_dataset(session: Session, dataset_id: str, pointer: str = "/dataset") -> DatasetRow:
    """The dataset, which is not deleted before the transaction has ended.

    Args:
        pointer: where in the request it stands.

    Raises:
        RequestInvalid: there is none, or it was deleted.
        StateConflict: an unfinished job is going to drop it.
    """
    try:
        row = datasets.get_dataset(session, dataset_id, lock=True)
    except NotFound as error:
        problem = f"there is no dataset {dataset_id}"
        raise RequestInvalid(
            f"T{problem[1:]}.", hint="Upload one with POST /datasets.", errors=[FieldError(pointer, problem)]
        ) from error
    dropping = datasets.dropping_job(session, dataset_id)
    if dropping is not None:
        problem = f"the dataset {dataset_id} is dropped when {dropping} succeeds"
        raise StateConflict(
            f"T{problem[1:]}.",
            hint="Cancel that job, or upload the file again later.",
            errors=[FieldError(pointer, problem)],
        )
    return row
