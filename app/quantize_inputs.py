"""Whether a base model can be quantised, from what the database knows of it."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.base_models import base_model, weights_problem
from app.dataset_choice import check_suitable
from app.schemas.quantize import QuantizeParams
from app.settings import Settings
from app.stored_inputs import stored_dataset
from artifacts.errors import FieldError, RequestInvalid
from artifacts.pointers import pointers_below
from storage import models
from storage.tables import ModelRow
from train.feasibility import check_base_kind
from train.targets import resolve_targets


def check_quantize(_: Settings, session: Session, request: QuantizeParams, devices: int) -> str:
    """Refuse what can not be quantised. `request` gets the id of the base model.

    Returns:
        The id of the base model.

    Raises:
        RequestInvalid: an unknown or removed base model, one whose files are not here, that is a pipeline or quantised
            already; layers that it does not have, or a rank that does not fit them.
    """
    del devices
    row = base_model(session, request.model, lock=True, pointer="/model")
    _check_kind(row)
    _check_layers(row, request)
    if request.fisher is not None:
        with pointers_below("/fisher"):
            dataset = stored_dataset(session, request.fisher.dataset)
            check_suitable(dataset, request.fisher.task)
        with pointers_below("/model", "/base_model"):
            check_base_kind(models.ref_of(row), request.fisher.task)
    request.model = row.id
    return row.id


def _check_kind(row: ModelRow) -> None:
    problem = weights_problem(row, pipeline="are quantised", quantised="it is quantised already")
    if problem is not None:
        raise RequestInvalid(f"{row.name!r} can not be quantised: {problem}.", errors=[FieldError("/model", problem)])


def _check_layers(row: ModelRow, request: QuantizeParams) -> None:
    """Layers that are named must be there, and larger than the rank; which ones all-linear means, the worker finds."""
    wanted = request.parameters.target_modules
    if row.fingerprint is None or wanted == "all-linear":
        return
    linear = {str(path): (int(d_out), int(d_in)) for path, d_out, d_in in row.fingerprint}
    targets = resolve_targets(linear, wanted)
    smallest = min(targets, key=lambda target: min(target.d_out, target.d_in))
    limit = min(smallest.d_out, smallest.d_in) - 1
    if request.parameters.rank > limit:
        problem = f"rank {request.parameters.rank} is above {limit}, one below the smaller side of {smallest.path}"
        raise RequestInvalid(
            f"R{problem[1:]}.",
            hint=f"Take a rank of at most {limit}.",
            errors=[FieldError("/parameters/rank", problem)],
        )
