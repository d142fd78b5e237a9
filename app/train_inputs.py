"""Whether a training can be done, from what the database knows of its base model and its dataset."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.base_models import base_model
from app.dataset_choice import check_suitable
from app.federations import check_federation
from app.main_memory import memory_of_all
from app.schemas.train import Training, TrainParams, TrainRequest
from app.settings import Settings
from app.stored_inputs import stored_adapters, stored_dataset
from app.transferable_inputs import check_transferable
from artifacts.errors import FieldError, RequestInvalid
from artifacts.manifest import AdapterManifest
from storage import adapters, models
from storage.tables import DatasetRow, ModelRow
from train.catalog import find_method, parse_parameters
from train.continuation import POINTER, ContinueFrom, check_base, continued_options, place
from train.engine_outlook import check_trained
from train.estimate import Estimate, check_fits, estimate
from train.feasibility import check_base_kind, check_feasible
from train.groups import POINTER as GROUPS
from train.options.common import Circumstances
from train.packed_base import fitted, packed_bytes
from train.settings import EvaluationSettings, is_packed
from train.targets import check_method, wanted_targets

_SHOWN = 20
_WITHOUT_HEAD: frozenset[str] = frozenset({"causal-lm", "text-to-image"})
"""Tasks that train no module whole."""


def check_train(settings: Settings, session: Session, request: TrainParams, devices: int = 1) -> str:
    """Refuse what can never be trained.

    Args:
        devices: that train together, each with the base model and its share of every batch.

    Returns:
        The id of the base model.

    Raises:
        RequestInvalid and its kin: an unknown or removed base model, an unknown dataset, parameters that do not fit the
            layers of the base model, more memory than the machine has.
        StateConflict: a dataset that shall be dropped is needed elsewhere, or is about to be dropped.
    """
    check_feasible(request.full_task, request.training, request.evaluation, devices)
    row = _base_model(session, request, lock=True)
    dataset = stored_dataset(session, request.dataset)
    check_suitable(dataset, request.full_task)
    check_groups(dataset, request.evaluation)
    check_federation(session, request, devices)
    if request.transferable is not None:
        check_transferable(session, request, request.transferable, row, dataset, devices)
    needed = _estimate(session, row, request, devices, dataset.rows)
    memory = memory_of_all(settings, session)
    if needed is not None and memory is not None:
        where = "this machine" if devices == 1 else f"each of {devices} devices of this machine"
        check_fits(needed, memory // devices, where)
    return row.id


def check_groups(dataset: DatasetRow, evaluation: EvaluationSettings) -> None:
    """Refuse to group by a column that the dataset has not in every row, or that is no name of a group."""
    wanted = evaluation.group_column
    if wanted is None:
        return
    columns = {str(column["name"]): column for column in dataset.columns}
    found = columns.get(wanted)
    if found is None:
        problem = f"the dataset {dataset.name!r} has no column {wanted!r}; it has {', '.join(list(columns)[:_SHOWN])}"
    elif found["nulls"]:
        problem = f"the column {wanted!r} of the dataset {dataset.name!r} is missing or null in {found['nulls']} rows"
    elif found["type"] not in ("string", "integer"):
        problem = f"the column {wanted!r} of the dataset {dataset.name!r} has values of type {found['type']}"
    else:
        return
    raise RequestInvalid(
        f"T{problem[1:]}.",
        hint="Take a column with a text or a whole number in every row, such as the name of its task.",
        errors=[FieldError(GROUPS, problem)],
    )


def estimate_training(session: Session, request: TrainRequest) -> Estimate | None:
    """What the training will take on each device; None when the base model's layers are not known yet.

    Raises:
        RequestInvalid and its kin: an unknown base model, or parameters that do not fit its layers.
    """
    wanted = request.resources.devices if request.resources is not None else None
    devices = wanted or 1
    check_feasible(request.full_task, request.training, request.evaluation, devices)
    return _estimate(session, _base_model(session, request), request, devices)


def _base_model(session: Session, request: Training, *, lock: bool = False) -> ModelRow:
    row = base_model(session, request.base_model, lock=lock)
    check_base_kind(models.ref_of(row), request.full_task)
    return row


def _estimate(
    session: Session, row: ModelRow, request: Training, devices: int, rows: int | None = None
) -> Estimate | None:
    options = parse_parameters(request.method, request.parameters)
    find_method(request.method).check_task(request.full_task.type)
    options = fitted(find_method(request.method), options, row.quantisation)
    start = _start(session, row, request.start)
    if start is not None:
        options = continued_options(find_method(request.method), options, start)
    if row.fingerprint is None:
        if request.target_engine is not None:
            check_trained(find_method(request.method), options, request.full_task.type, (), request.target_engine)
        return None
    linear = {str(path): (int(d_out), int(d_in)) for path, d_out, d_in in row.fingerprint}
    packed = packed_bytes(row.quantisation)
    adaptable = {path: linear[path] for path in packed} if packed else linear
    targets = wanted_targets(adaptable, options, request.full_task)
    if start is not None:
        # What a task trains whole, such as a new classifier, only the worker knows.
        place(start, targets, () if request.full_task.type in _WITHOUT_HEAD else None)
    steps = request.training.steps if rows is None else request.training.steps_for(rows)
    known = Circumstances(
        targets, request.training, steps, rows, is_packed(request.full_task), request.evaluation.grouped, devices
    )
    check_method(options, known)
    if request.target_engine is not None:
        check_trained(find_method(request.method), options, request.full_task.type, targets, request.target_engine)
    sizes = (row.parameter_count, devices)
    return estimate(options, targets, linear, request.training, request.full_task, *sizes, packed=packed)


def _start(session: Session, base: ModelRow, wanted: ContinueFrom | None) -> AdapterManifest | None:
    """The adapter that the training goes on from."""
    if wanted is None:
        return None
    row = stored_adapters(session, [(POINTER, wanted.adapter)])[wanted.adapter]
    check_base(row.id, adapters.base_of(session, row), models.ref_of(base), wanted.minimum_compatibility)
    return adapters.manifest_of(row)
