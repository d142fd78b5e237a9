"""Parts of a request that are validated apart from the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from app.problems import pointer_of
from artifacts.errors import FieldError, RequestInvalid
from artifacts.menu import validated

Model = TypeVar("Model", bound=BaseModel)


def parse_part(model: type[Model], value: Mapping[str, Any], prefix: str) -> Model:
    """Validate a part of a request that lies at `prefix`. Raises RequestInvalid, with pointers."""
    try:
        return validated(model, value)
    except ValidationError as error:
        findings = [
            FieldError(prefix + pointer_of(item["loc"]), item["msg"].removeprefix("Value error, "))
            for item in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise RequestInvalid(f"{findings[0].pointer}: {findings[0].message}", errors=findings) from error
