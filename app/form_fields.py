"""The text fields of a form, checked by a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from app.problems import pointer_of
from artifacts.errors import FieldError, RequestInvalid

Form = TypeVar("Form", bound=BaseModel)


def once(name: str, given: list[str]) -> str:
    """The value of a field that has one.

    Raises:
        RequestInvalid: it is given several times.
    """
    if len(given) > 1:
        raise RequestInvalid(
            f"The field {name!r} is given {len(given)} times.", errors=[FieldError(f"/{name}", "must be given once")]
        )
    return given[0]


def form_of(model: type[Form], values: Mapping[str, Any]) -> Form:
    """The form that these values make.

    Raises:
        RequestInvalid: a value out of bounds.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        findings = [FieldError(pointer_of(item["loc"]), item["msg"]) for item in error.errors(include_input=False)]
        raise RequestInvalid(f"{findings[0].pointer}: {findings[0].message}", errors=findings) from error
