"""The base model that a submission names."""

from __future__ import annotations

from sqlalchemy.orm import Session

from artifacts.errors import FieldError, RequestInvalid
from storage import database, models
from storage.tables import ModelRow


def base_model(session: Session, name: str) -> ModelRow:
    """The registered base model with this id or name.

    Raises:
        RequestInvalid: there is none, or it was removed; at /base_model.
    """
    row = models.find_model(session, name)
    if row is None:
        problem = f"there is no base model {name!r}"
        hint = "GET /models lists those that are registered."
        raise RequestInvalid(f"T{problem[1:]}.", hint=hint, errors=[FieldError("/base_model", problem)])
    if row.removed_at is not None and row.removed_at <= database.now(session):
        problem = f"the base model {row.name!r} was removed on {row.removed_at:%Y-%m-%d}"
        raise RequestInvalid(f"T{problem[1:]}.", errors=[FieldError("/base_model", problem)])
    return row
