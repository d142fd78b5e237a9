"""A body of a call as a YAML file, in which files of this machine may be named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from app.problems import pointer_of
from artifacts.errors import FieldError, RequestInvalid

MAX_BYTES = 1024 * 1024
_IDS = ("dat_", "mdl_", "adp_")
Body = TypeVar("Body", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Numbers as YAML 1.2 has them: 1e-4 too, which YAML 1.1 takes for a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$", re.ASCII), list("-+.0123456789")
)


def read_mapping(path: Path, page: str) -> dict[str, Any]:
    """The document of the file.

    Args:
        page: of the docs, for who gave something else.

    Raises:
        RequestInvalid: it is too large, no YAML, or no mapping.
    """
    if path.stat().st_size > MAX_BYTES:
        raise RequestInvalid(f"{path} has more than {MAX_BYTES} bytes: that is no recipe.")
    try:
        document = _Loader(path.read_text(encoding="utf-8")).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestInvalid(f"{path} is not valid YAML: {error}") from error
    if not isinstance(document, Mapping):
        raise RequestInvalid(f"{path} is no mapping of names to values.", hint=f"See docs: {page}.")
    return {str(key): value for key, value in document.items()}


def checked(path: Path, body: type[Body], document: Mapping[str, Any]) -> Body:
    """The document as the service would take it.

    Raises:
        RequestInvalid: a field is wrong; each finding with its place.
    """
    try:
        return body.model_validate(dict(document))
    except ValidationError as error:
        findings = [
            FieldError(pointer_of(item["loc"]), item["msg"].removeprefix("Value error, "))
            for item in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise RequestInvalid(f"{path}: {findings[0].pointer}: {findings[0].message}", errors=findings) from error


def existing(beside: Path, value: object, *, folder: bool | None) -> Path | None:
    """The path that a value names, relative to `beside`, if there is such a folder (or else file; None: either)."""
    if not isinstance(value, str) or value.startswith(_IDS):
        return None
    found = beside / Path(value).expanduser()
    exists = found.exists() if folder is None else found.is_dir() if folder else found.is_file()
    return found.resolve() if exists else None
