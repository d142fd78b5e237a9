"""Whether adapters can be merged, from what the database knows of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from sqlalchemy.orm import Session

from app.base_models import base_model, weights_problem
from app.conversion_inputs import check_convert
from app.dataset_choice import check_suitable
from app.request_parts import parse_part
from app.schemas.conversion import ConvertParams
from app.schemas.merge import CompareMergesParams, MergeAdapter, MergeEvaluation, MergeParams
from app.settings import Settings
from app.stored_inputs import stored_adapters, stored_dataset
from artifacts.base_model import check_modules, compare
from artifacts.errors import BaseMismatch, FieldError, MergeRefused, RequestInvalid
from artifacts.pointers import pointers_below
from merge.catalog import SEARCH, parse_parameters, pointers_as_sent
from merge.convertible import PACKED
from merge.engine_form import check_merged
from merge.options import MergeOptions
from merge.plan import NAMED_OFFENDERS, MergeInput, at_least_rank, plan_merge
from merge.search_options import SearchOptions
from merge.search_space import SearchSpace
from storage import adapters, models
from storage.tables import ModelRow
from train.feasibility import check_base_kind


def check_merge(settings: Settings, session: Session, request: MergeParams, devices: int) -> str | None:
    """Refuse a merge that can not be done. It works on the factors alone: it loads no base model.

    For a merge into the base model, or a search, `request` gets its id, if it does not name it.

    Returns:
        That id; None for any other merge.

    Raises:
        RequestInvalid and its kin: see `merge_inputs`, `merge.plan.plan_merge`, `merge.engine_form.check_merged`,
            `_check_base`, `_check_search`.
    """
    del devices
    if request.method == SEARCH.name:
        if request.convert:
            problem = "is not for method search"
            raise RequestInvalid(f"convert {problem}.", errors=[FieldError("/convert", problem)])
        return _check_search(session, request)
    if request.evaluation is not None:
        problem = "belongs to method search; POST /merge/compare measures other merges"
        raise RequestInvalid(f"evaluation {problem}.", errors=[FieldError("/evaluation", problem)])
    options = parse_parameters(request.method, request.parameters)
    inputs = merge_inputs(session, request.adapters)
    others = [position for position, item in enumerate(inputs) if not item.mergeable] if request.convert else []
    for position in others:
        _check_conversion(settings, session, request.adapters[position].id, f"/adapters/{position}/id")
    if not others:  # else the worker plans, once their ranks are known
        with pointers_as_sent(request.method, request.parameters):
            plan = plan_merge(inputs, request.method, options)
            if request.target_engine is not None:
                check_merged(at_least_rank(plan, options), request.target_engine)
    if request.output == "adapter":
        return None
    row = _base_of(session, [item.id for item in request.adapters], request.base_model)
    _check_base(row, inputs, options)
    request.base_model = row.id
    return row.id


def _check_conversion(settings: Settings, session: Session, adapter_id: str, place: str) -> None:
    """Raises RequestInvalid and its kin: the adapter can not be made a plain LoRA with what is registered."""
    wanted = ConvertParams(adapter=adapter_id, to="lora")
    with pointers_below(place, "/base_model"), pointers_below(place, "/adapter"):
        check_convert(settings, session, wanted, 1)
        if adapters.get_adapter(session, adapter_id).method == PACKED:
            problem = f"a {PACKED} becomes a LoRA of another base model"
            raise MergeRefused(
                f"A{problem[1:]}.",
                hint="Convert it with POST /adapters/{id}/convert, and merge the result.",
                errors=[FieldError(place, problem)],
            )


def _base_of(session: Session, ids: Sequence[str], name: str | None) -> ModelRow:
    """The model that is named, else that of the adapters."""
    if name is not None:
        return base_model(session, name, lock=True)
    found = [adapters.model_of(session, adapters.get_adapter(session, item)) for item in ids]
    models_found = {row.id for row in found if row is not None}
    if len(models_found) != 1:
        problem = (
            "the adapters belong to no registered model"
            if not models_found
            else "the adapters belong to several models"
        )
        raise RequestInvalid(
            f"T{problem[1:]}: it is not known which one to take.",
            hint="Register the base model (POST /models) and name it.",
            errors=[FieldError("/base_model", problem)],
        )
    return base_model(session, models_found.pop(), lock=True)


def _check_base(row: ModelRow, inputs: Sequence[MergeInput], options: MergeOptions) -> None:
    """Refuse a base model that the adapters can not be merged into.

    Raises:
        MergeRefused and its kin: its weights are quantised, or it is a pipeline; see `_check_fits`.
    """
    problem = weights_problem(
        row,
        pipeline="can be merged into",
        quantised="its weights are quantised; take the model that it was made of",
        from_hub=True,
    )
    if problem is not None:
        raise MergeRefused(
            f"Nothing can be merged into {row.name!r}: {problem}.",
            hint="Merge with output adapter, and load the result beside the base model.",
            errors=[FieldError("/base_model", problem)],
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
        with _of_candidate(position), pointers_as_sent(item.method, item.parameters):
            plan_merge(inputs, item.method, found)
    if request.evaluation is None:
        return None
    request.evaluation = _with_base(session, request.evaluation, inputs, options[0])
    return request.evaluation.base_model


def _with_base(
    session: Session, wanted: MergeEvaluation, inputs: Sequence[MergeInput], options: MergeOptions
) -> MergeEvaluation:
    """The evaluation with the id of its base model.

    Raises:
        RequestInvalid and its kin: it can not be done; pointers lie below `/evaluation`.
    """
    with pointers_below("/evaluation/base_model", "/base_model"):
        row = _base_of(session, [item.id for item in inputs], wanted.base_model)
        check_base_kind(models.ref_of(row), wanted.full_task)
        _check_fits(row, inputs, options)
    for pointer, dataset in wanted.named:
        place = f"/evaluation{pointer}"
        check_suitable(stored_dataset(session, dataset, place), wanted.full_task, place)
    return wanted.model_copy(update={"base_model": row.id})


def _check_search(session: Session, request: MergeParams) -> str | None:
    """As `check_merge`, for all that a search may try: every method at the ends of its ranges.

    Raises:
        RequestInvalid and its kin: see `merge.search_space.SearchSpace.of`, `_with_base`; a merge that it may try, and
            that can not be done.
    """
    if request.output != "adapter":
        problem = "a search ends as an adapter; POST its recipe again with output base"
        raise RequestInvalid(f"{problem[0].upper()}{problem[1:]}.", errors=[FieldError("/output", problem)])
    if request.evaluation is None:
        problem = "a search needs data on which it measures its trials"
        raise RequestInvalid(
            f"A{problem[1:]}.",
            hint='Name a dataset: {"evaluation": {"dataset": "dat_…"}}. POST /merge/compare needs none.',
            errors=[FieldError("/evaluation", problem)],
        )
    options = parse_part(SearchOptions, request.parameters, "/parameters")
    space = SearchSpace.of(options, [item.weight for item in request.adapters])
    inputs = merge_inputs(session, request.adapters)
    for position in range(len(space.methods)):
        extreme = space.proposal(space.extreme(position))
        weighted = [replace(item, weight=weight) for item, weight in zip(inputs, extreme.weights, strict=True)]
        try:
            found = extreme.options
        except RequestInvalid:
            continue  # parameters that do not go together at this end of their ranges: a failed trial, if it is tried
        with space.located(position):
            plan = plan_merge(weighted, extreme.method, found)
            if request.target_engine is not None:
                check_merged(at_least_rank(plan, found), request.target_engine)
    minimum = options.methods[0].parameters.get("minimum_compatibility")
    common = MergeOptions(minimum_compatibility=minimum if isinstance(minimum, str) else None)
    request.evaluation = _with_base(session, request.evaluation, inputs, common)
    return request.evaluation.base_model


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
