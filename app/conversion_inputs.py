"""Whether an adapter can be converted, from what the database knows of it."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.base_models import base_model
from app.schemas.conversion import ConvertParams
from app.settings import Settings
from app.stored_inputs import stored_adapters
from artifacts.errors import FieldError, MergeRefused, RequestInvalid
from artifacts.quantised_base import packed_layers
from merge.convertible import CONVERTIBLE, PACKED, lost, need_of
from storage import adapters
from storage.tables import AdapterRow, ModelRow


def check_convert(_: Settings, session: Session, request: ConvertParams, devices: int) -> str | None:
    """Refuse what can not be converted. `request` gets the id of the base model, if it is needed and not named.

    Returns:
        The id of the base model, if it is needed or named.

    Raises:
        RequestInvalid: an unknown adapter or base model.
        MergeRefused: a type that is not converted, or a base model that is not known.
    """
    del devices
    row = stored_adapters(session, [("/adapter", request.adapter)])[request.adapter]
    if request.to != "lora":
        return _check_unpacking(session, row, request)
    if request.dtype is not None:
        problem = "a LoRA is written in float32; dtype is of the models that unpacked_lora and merged write"
        raise RequestInvalid(f"A{problem[1:]}.", errors=[FieldError("/dtype", problem)])
    manifest = adapters.manifest_of(row)
    need = need_of(row.method, manifest.modules, manifest.report.facts.typed)
    if need is None:
        problem = (
            f"{row.name} is a {row.method}, which a merge takes as it is"
            if row.mergeable
            else f"{row.name} is of type {row.method}; converted are {', '.join(CONVERTIBLE)}"
        )
        raise MergeRefused(f"{problem}.", errors=[FieldError("/adapter", problem)])
    loss = lost(manifest.report.facts.lasting)
    if loss is not None:
        raise MergeRefused(
            f"{loss[0].upper()}{loss[1:]}.",
            hint="GET /adapters/{id}/keys says what became of every tensor.",
            errors=[FieldError("/adapter", loss)],
        )
    if need == "nothing":
        if request.base_model is not None:
            request.base_model = base_model(session, request.base_model, lock=True).id
        return request.base_model
    model = _model_of(session, row, request)
    if need == "weights" and model.source == "hub":
        problem = f"the files of {model.name} lie on a hub"
        raise MergeRefused(
            f"T{problem[1:]}: what a {row.method} adds can not be computed.",
            hint="Register a folder of the server (POST /models).",
            errors=[FieldError("/base_model", problem)],
        )
    if need == "sides" and model.fingerprint is None:
        problem = f"the layers of {model.name} are not known"
        raise MergeRefused(
            f"T{problem[1:]}.",
            hint="Register a folder of the server (POST /models).",
            errors=[FieldError("/base_model", problem)],
        )
    request.base_model = model.id
    return model.id


def _check_unpacking(session: Session, row: AdapterRow, request: ConvertParams) -> str:
    """What becomes a model needs the packed weights that it was trained on; which those are, the worker checks."""
    if row.method != PACKED:
        problem = f"{row.name} is a {row.method}; {request.to} is for adapters trained beside packed weights ({PACKED})"
        raise MergeRefused(
            f"{problem}.",
            hint="POST /merge with output 'base' adds a plain LoRA to its base model.",
            errors=[FieldError("/to", problem)],
        )
    if request.rank is not None:
        problem = f"{request.to} keeps the rank as it is"
        raise RequestInvalid(f"{problem}.", errors=[FieldError("/rank", problem)])
    if request.max_error is not None:
        problem = f"{request.to} loses nothing of the change; max_error is for a lora"
        raise RequestInvalid(f"{problem}.", errors=[FieldError("/max_error", problem)])
    model = _model_of(session, row, request)
    if model.source == "hub" or not packed_layers(model.quantisation):
        problem = f"the weights of {model.name} are not packed"
        raise MergeRefused(
            f"T{problem[1:]}: the adapter is nothing without the packed weights that it was trained on.",
            hint="Name the base model that POST /models/{id}/quantize made and that the adapter was trained on.",
            errors=[FieldError("/base_model", problem)],
        )
    request.base_model = model.id
    return model.id


def _model_of(session: Session, row: AdapterRow, request: ConvertParams) -> ModelRow:
    if request.base_model is not None:
        return base_model(session, request.base_model, lock=True)
    found = adapters.model_of(session, row)
    if found is None:
        problem = f"{row.name} belongs to no registered model, and a {row.method} is converted with its help"
        raise RequestInvalid(
            f"{problem}.",
            hint="Register the base model (POST /models) and name it.",
            errors=[FieldError("/base_model", problem)],
        )
    return base_model(session, found.id, lock=True)
