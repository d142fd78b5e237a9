"""The base model that whoever brings an adapter says it is for."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

from artifacts.base_model import check_modules
from artifacts.errors import FieldError, RequestInvalid, ShapeMismatch
from artifacts.manifest import LoraModule
from storage import models
from storage.tables import ModelRow


def declared_base(session: Session, named: str | None) -> tuple[ModelRow | None, str | None]:
    """The registered base model of that id or name, if there is one, and the name to write down.

    Raises:
        RequestInvalid: an id that no model has.
    """
    if named is None:
        return None, None
    model = models.find_model(session, named)
    if model is not None:
        return model, model.location if model.source == "hub" else model.name
    if named.startswith("mdl_"):
        raise RequestInvalid(
            f"There is no base model {named!r}.",
            hint="Register it with POST /models, or give the model's name.",
            errors=[FieldError("/base_model", "unknown id")],
        )
    return None, named


def check_declared(model: ModelRow, modules: Sequence[LoraModule]) -> None:
    """Raises ShapeMismatch: the base model's layers are known, and the adapter does not fit them."""
    fingerprint = models.ref_of(model).fingerprint
    if fingerprint is None:
        return
    offenders = check_modules(fingerprint, modules)
    if offenders:
        raise ShapeMismatch(
            f"The adapter does not fit {model.name}: {len(offenders)} of its modules are not there or have other "
            f"dimensions, for instance {offenders[0]}.",
            hint="Name the base model that the adapter was trained on.",
            errors=[FieldError("/base_model", text) for text in offenders[:20]],
        )
