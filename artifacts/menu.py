"""How a menu of methods is looked into, whatever its methods do: a row by its name, parameters by its options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from artifacts.errors import FieldError, RequestInvalid
from artifacts.pointers import pointer_token

Row = TypeVar("Row")
Options = TypeVar("Options", bound=BaseModel)

NO_NUL = r"^[^\x00]*$"
"""Pattern of texts that every database stores: PostgreSQL has no NUL."""
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""A JSON number, which neither a text nor true is; bounds are added where it is used."""
_SHOWN = 80
"""Characters of a name that is not known."""
_ACCEPTED: ContextVar[bool] = ContextVar("accepted_parameters", default=False)


def find_row(menu: Mapping[str, Row], title: str, name: str) -> Row:
    """The row of a method; `title` is its kind in a sentence.

    Raises:
        RequestInvalid: there is none; with the names that exist.
    """
    if name not in menu:
        known = ", ".join(menu)
        raise RequestInvalid(
            f"There is no {title} method {name[:80]!r}.",
            hint=f"Methods: {known}. See GET /methods.",
            errors=[FieldError("/method", f"must be one of: {known}")],
        )
    return menu[name]


@contextmanager
def accepted_parameters() -> Iterator[None]:
    """Inside, `validated` reads what was checked when it was sent: parameters of a job or of a schedule.

    Earlier versions took "2" and true for numbers, and kept them as they were sent: here they are still taken so.
    """
    token = _ACCEPTED.set(True)
    try:
        yield
    finally:
        _ACCEPTED.reset(token)


def validated(model: type[Options], value: Mapping[str, Any]) -> Options:
    """A part of a request, sent now or accepted before. Raises pydantic.ValidationError."""
    return model.model_validate(dict(value), strict=False if _ACCEPTED.get() else None)


def parse_options(options: type[Options], kind: str, title: str, name: str, parameters: Mapping[str, Any]) -> Options:
    """Validate the parameters of a method.

    Args:
        kind, name: where `GET /methods/{kind}/{name}` describes them.
        title: of the kind, in a sentence.

    Raises:
        RequestInvalid: an unknown parameter, or a value out of range; each finding with its JSON pointer.
    """
    try:
        return validated(options, parameters)
    except ValidationError as error:
        findings = _findings(error)
        raise RequestInvalid(
            f"The parameters of {title} method {name!r} are not valid: {findings[0].message}",
            hint=f"GET /methods/{kind}/{name} describes every parameter.",
            errors=findings,
        ) from error


def _findings(error: ValidationError) -> list[FieldError]:
    """One finding per field: a union reports every branch that failed, which would only repeat itself."""
    findings: dict[str | None, list[str]] = {}
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        # Beyond the field's name, a location only tells which branch of a union was tried.
        name = str(item["loc"][0]) if item["loc"] else None
        findings.setdefault(name, []).append(item["msg"].removeprefix("Value error, "))
    return [
        FieldError(
            "/parameters" if name is None else f"/parameters/{pointer_token(name)}",
            f"{'parameters' if name is None else name[:_SHOWN]}: " + ", or ".join(dict.fromkeys(messages)),
        )
        for name, messages in findings.items()
    ]
