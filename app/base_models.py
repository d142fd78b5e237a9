"""The base model that a submission names."""

from __future__ import annotations

from sqlalchemy.orm import Session

from artifacts.base_model import UNET
from artifacts.errors import FieldError, RequestInvalid
from storage import models
from storage.tables import ModelRow


def base_model(session: Session, name: str, *, lock: bool = False, pointer: str = "/base_model") -> ModelRow:
    """The registered base model with this id or name.

    Args:
        lock: keep it from being removed until the transaction ends: for whoever makes a job that needs it.
        pointer: where the request names it.

    Raises:
        RequestInvalid: there is none, or it was removed.
    """
    row = models.find_model(session, name)
    if row is None:
        problem = f"there is no base model {name!r}"
        hint = "GET /models lists those that are registered."
        raise RequestInvalid(f"T{problem[1:]}.", hint=hint, errors=[FieldError(pointer, problem)])
    if lock:
        session.refresh(row, with_for_update={"read": True})
    if row.removed_at is not None:
        problem = f"the base model {row.name!r} was removed on {row.removed_at:%Y-%m-%d}"
        raise RequestInvalid(f"T{problem[1:]}.", errors=[FieldError(pointer, problem)])
    return row


def weights_problem(row: ModelRow, *, pipeline: str, quantised: str, from_hub: bool = False) -> str | None:
    """Why the weights of a base model can not be read and changed as those of a transformers model; None if they can.

    Args:
        pipeline, quantised: the end of the sentence for a diffusers pipeline, and what is said of packed weights.
        from_hub: those of a repository, of which nothing else is known here, will be fetched.
    """
    if row.source == "hub":
        if from_hub:
            return None
        return "its files lie on a hub; register a folder of the server"
    if row.pipeline is not None or row.architecture == UNET:
        return f"it is a diffusers pipeline; only models of transformers {pipeline}"
    return None if row.quantisation is None else quantised
