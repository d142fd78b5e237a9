"""Whether a training can make its adapter transferable, from what is known when it is submitted."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.schemas.train import TrainParams, TransferableParams
from artifacts.errors import FieldError, RequestInvalid, StateConflict
from artifacts.pointers import pointers_below
from storage import datasets
from storage.tables import DatasetRow, ModelRow
from train.catalog import parse_parameters
from train.options.common import Circumstances
from train.settings import CausalLmTask
from train.targets import check_method, wanted_targets

POINTER = "/transferable"


def check_transferable(
    session: Session,
    request: TrainParams,
    wanted: TransferableParams,
    base: ModelRow,
    dataset: DatasetRow,
    devices: int,
) -> None:
    """Refuse what can never be done. What only the rows and the tokenizer tell, the worker finds before it trains.

    Raises:
        RequestInvalid: another task, several devices, a dataset of plain texts, parameters of the discriminator that do
            not fit the base model.
        StateConflict: the dataset shall be dropped, and others need it.
    """
    task = request.full_task
    if not isinstance(task, CausalLmTask):
        raise _invalid(POINTER, f"adapters for {task.type} can not be transferred: only those for causal-lm")
    if devices > 1:
        raise _invalid("/resources/devices", f"a transferable adapter is trained on one device, not {devices}")
    if parse_parameters(request.method, request.parameters).gives_beside:
        raise _invalid(POINTER, "a transferable adapter comes out of its training alone: leave parameters.fold out")
    own_columns = any(name.endswith("_column") for name in task.model_fields_set)
    forms = {item["form"] for item in dataset.tasks if item["task"] == task.type and item["usable"]}
    if forms == {"text"} and not own_columns:
        problem = f"the dataset {dataset.name!r} has plain texts; a transfer needs prompts apart from their answers"
        raise _invalid("/dataset", problem)
    asked = wanted.discriminator
    with pointers_below(f"{POINTER}/discriminator"):
        options = asked.options(parse_parameters(request.method, request.parameters))
        if base.fingerprint is not None:
            linear = {str(path): (int(d_out), int(d_in)) for path, d_out, d_in in base.fingerprint}
            targets = wanted_targets(linear, options, task)
            check_method(options, Circumstances(targets, asked.loop(request.training)))
    if wanted.drop_dataset:
        _check_free(session, dataset)


def _check_free(session: Session, dataset: DatasetRow) -> None:
    users = datasets.users_of(session, dataset.id)
    if users:
        listed = ", ".join(users[: datasets.LISTED]) + (" …" if len(users) > datasets.LISTED else "")
        problem = f"the dataset {dataset.name!r} can not be dropped: it is needed by {listed}"
        raise StateConflict(
            f"T{problem[1:]}.",
            hint="Wait until they have ended, or delete the schedules.",
            errors=[FieldError(f"{POINTER}/drop_dataset", problem)],
        )


def _invalid(pointer: str, problem: str) -> RequestInvalid:
    return RequestInvalid(f"{problem[0].upper()}{problem[1:]}.", errors=[FieldError(pointer, problem)])
