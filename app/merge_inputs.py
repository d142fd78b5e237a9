"""Whether adapters can be merged, from what the database knows of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy.orm import Session

from app.base_models import base_model, weights_problem
from app.dataset_choice import check_suitable
from app.schemas.merge import CompareMergesParams, MergeAdapter, MergeParams
from app.settings import Settings
from app.stored_inputs import stored_adapters, stored_dataset
from artifacts.base_model import check_modules, compare
from artifacts.errors import BaseMismatch, FieldError, MergeRefused, RequestInvalid
from artifacts.pointers import pointers_below
from merge.catalog import parse_parameters
from merge.engine_form import check_merged
from merge.options import MergeOptions
from merge.plan import NAMED_OFFENDERS, MergeInput, plan_merge
from storage import adapters, models
from storage.tables import ModelRow
from train.feasibility import check_base_kind


def check_merge(_: Settings, session: Session, request: MergeParams, devices: int) -> str | None:
    """Refuse a merge that can not be done. It works on the factors alone: it loads no base model.

    For a merge into the base model, `request` gets its id, if it does not name it.

    Returns:
        That id; None for any other merge.

    Raises:
        RequestInvalid and its kin: see `merge_inputs`, `merge.plan.plan_merge`, `merge.engine_form.check_merged`,
            `_check_base`.
    """
    del devices
    options = parse_parameters(request.method, request.parameters)
    inputs = merge_inputs(session, request.adapters)
    plan = plan_merge(inputs, request.method, options)
    if request.target_engine is not None:
        check_merged(plan, request.target_engine)
    if request.output == "adapter":
        return None
    row = _base_of(session, request.adapters, request.base_model)
    _check_base(row, inputs, options)
    request.base_model = row.id
    return row.id


def _base_of(session: Session, requested: Sequence[MergeAdapter], name: str | None) -> ModelRow:
    """The model that is named, else that of the adapters."""
    if name is not None:
        return base_model(session, name, lock=True)
    found = [adapters.model_of(session, adapters.get_adapter(session, item.id)) for item in requested]
    ids = {row.id for row in found if row is not None}
    if len(ids) != 1:
        problem = "the adapters belong to no registered model" if not ids else "the adapters belong to several models"
        raise RequestInvalid(
            f"T{problem[1:]}: it is not known which one to take.",
            hint="Register the base model (POST /models) and name it.",
            errors=[FieldError("/base_model", problem)],
        )
    return base_model(session, ids.pop(), lock=True)


def _check_base(row: ModelRow, inputs: Sequence[MergeInput], options: MergeOptions) -> None:
    """Refuse a base model that the adapters can not be merged into.

    Raises:
        MergeRefused and its kin: its files are not here, or it is a pipeline; see `_check_fits`.
    """
    problem = weights_problem(
        row,
        pipeline="can be merged into",
        quantised="its weights are quantised; take the model that it was made of",
    )
    if problem is not None:
        raise MergeRefused(
            f"Nothing can be merged into {row.name!r}: {problem}.", errors=[FieldError("/base_model", problem)]
        )
    _check_fits(row, inputs, options)


def _check_fits(row: ModelRow, inputs: Sequence[MergeInput], options: MergeOptions) -> None:
    """Refuse a base model that the adapters are known not to belong to.

    Raises:
        MergeRefused: layers that it lacks, or has in other dimensions.
        BaseMismatch: it is known to be another one than the adapters'.
    """
    ref = models.ref_of(row)
    for position, item in enumerate(inputs):
        pointer = f"/adapters/{position}/id"
        contradiction = compare(item.base, ref).contradiction
        if contradiction is not None and options.minimum_compatibility is None:
            raise BaseMismatch(
                f"{item.name} belongs to another base model than {row.name}: {contradiction}.",
                hint="If you know that it fits, set parameters.minimum_compatibility to 'architecture' or 'shape'.",
                errors=[FieldError(pointer, f"base model {item.base.name}")],
            )
        offenders = [] if ref.fingerprint is None else check_modules(ref.fingerprint, item.modules)
        if offenders:
            raise MergeRefused(
                f"{len(offenders)} modules of {item.name} do not fit {row.name}: {offenders[0]}.",
                errors=[FieldError(pointer, offender) for offender in offenders[:NAMED_OFFENDERS]],
            )


def check_merges(_: Settings, session: Session, request: CompareMergesParams, devices: int) -> str | None:
    """As `check_merge`, for every candidate; findings about one point below `/candidates/{its position}`.

    An evaluation gets the id of the base model, if it does not name it; that id is returned.
    """
    del devices
    options = []
    for position, item in enumerate(request.candidates):
        with _of_candidate(position):
            options.append(parse_parameters(item.method, item.parameters))
    inputs = merge_inputs(session, request.adapters)
    for position, (item, found) in enumerate(zip(request.candidates, options, strict=True)):
        with _of_candidate(position):
            plan_merge(inputs, item.method, found)
    wanted = request.evaluation
    if wanted is None:
        return None
    with pointers_below("/evaluation/dataset", "/dataset"), pointers_below("/evaluation/base_model", "/base_model"):
        check_suitable(stored_dataset(session, wanted.dataset), wanted.full_task)
        row = _base_of(session, request.adapters, wanted.base_model)
        check_base_kind(models.ref_of(row), wanted.full_task)
        _check_fits(row, inputs, options[0])
    request.evaluation = wanted.model_copy(update={"base_model": row.id})
    return row.id


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
        inputs.append(MergeInput.of(manifest, row.id, row.name, adapters.base_of(session, row), item.weight))
    return inputs
