"""Whether an adapter can be given to an engine's own library, from what the database knows of both."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.base_models import base_model
from app.schemas.load_checks import LoadCheckParams
from app.settings import Settings
from app.stored_inputs import stored_adapters
from artifacts.base_model import UNET
from artifacts.errors import FieldError, RequestInvalid
from artifacts.formats.writers import WRITERS
from artifacts.formats.writing import subject_of
from artifacts.loading import describes_its_layers, layout_for, why_not_counted
from artifacts.manifest import PEFT_FORMATS, AdapterManifest
from artifacts.pointers import pointers_below
from storage import adapters
from storage.downloads import check_one_component
from storage.tables import AdapterRow, ModelRow


def check_load(_: Settings, session: Session, request: LoadCheckParams, devices: int) -> str | None:
    """Refuse what says nothing. `request` gets the id of the base model, if one is known.

    Returns:
        None: of the base model no weights are read, so a worker that has them is no better than another.

    Raises:
        RequestInvalid: an unknown adapter or base model; a base model of another kind than the engine's, or none where
            one is needed; an adapter that can not be written as what the engine reads, or that needs more.
    """
    del devices
    row = stored_adapters(session, [("/adapter", request.adapter)])[request.adapter]
    manifest = adapters.manifest_of(row)
    reason = why_not_counted(manifest)
    if reason is not None:
        raise _refused("/engine", f"the adapter is not loaded here: {reason}", "")
    layout = layout_for(manifest, request.engine)
    with pointers_below("/engine", instead_of="/query/format"):
        if layout == "peft" and row.format in PEFT_FORMATS:
            check_one_component(row)
        elif layout != "safetensors":
            WRITERS[layout].plan(subject_of(manifest, layout, None))
    model = _model(session, row, request, manifest)
    request.base_model = None if model is None else model.id
    return None


def _model(session: Session, row: AdapterRow, request: LoadCheckParams, manifest: AdapterManifest) -> ModelRow | None:
    """The base model that is built; None for PEFT where none suits and layers will do."""
    if request.base_model is not None:
        model = base_model(session, request.base_model, lock=True)
        problem = _unsuitable(model, request.engine)
        if problem is not None:
            raise _refused("/base_model", f"{model.name!r} {problem}", "Name another base model.")
        return model
    found = adapters.model_of(session, row)
    problem = "no base model of it is registered" if found is None else _unsuitable(found, request.engine)
    if found is not None and problem is None and found.removed_at is not None:
        problem = "its base model was removed"
    if found is not None and problem is None:
        return base_model(session, found.id, lock=True)
    if request.engine == "peft" and describes_its_layers(manifest):
        return None
    hint = "Register the base model (POST /models) and name it."
    if request.engine == "peft":
        problem = f"{problem}, and the adapter does not tell the sizes of the layers that it needs"
    raise _refused("/base_model", f"{problem}; {request.engine} loads an adapter into one", hint)


def _unsuitable(model: ModelRow, engine: str) -> str | None:
    is_pipeline = model.pipeline is not None or model.architecture == UNET
    if engine != "diffusers":
        return f"is a pipeline of diffusers, and {engine} loads adapters into one model" if is_pipeline else None
    if model.source == "hub":  # of which it may not be known what it is
        return "lies on a hub; register a folder of the server"
    return None if is_pipeline else "is no pipeline of diffusers"


def _refused(pointer: str, problem: str, hint: str) -> RequestInvalid:
    return RequestInvalid(
        f"{problem[0].upper()}{problem[1:]}.", hint=hint or None, errors=[FieldError(pointer, problem)]
    )
