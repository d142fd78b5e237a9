"""A training's recipe: a YAML file with the body of `POST /train`, in which files of this machine may be named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from app.problems import pointer_of
from app.schemas.train import TrainRequest
from artifacts.errors import FieldError, RequestInvalid

_DATASET = "dat_" + "0" * 32
_ADAPTER = "adp_" + "0" * 32
MAX_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked recipe.

    Attributes:
        body: as the service takes it, but for the files.
        model_folder: the base model, if it is a folder of this machine; the training then runs here.
        dataset_file: the dataset, if it is a file of this machine.
        adapter_folder: the adapter to go on from, if it is a folder of this machine.
    """

    body: dict[str, Any]
    request: TrainRequest
    model_folder: Path | None
    dataset_file: Path | None
    adapter_folder: Path | None = None


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe; paths in it are relative to its own folder.

    Raises:
        RequestInvalid: it is no YAML mapping, or a field is wrong; each finding with its place.
    """
    if path.stat().st_size > MAX_BYTES:
        raise RequestInvalid(f"{path} has more than {MAX_BYTES} bytes: that is no recipe.")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestInvalid(f"{path} is not valid YAML: {error}") from error
    if not isinstance(document, Mapping):
        raise RequestInvalid(f"{path} is no mapping of names to values.", hint="See docs: Train an adapter.")
    body = {str(key): value for key, value in document.items()}
    model_folder = _existing(path.parent, body.get("base_model"), folder=True)
    dataset_file = _existing(path.parent, body.get("dataset"), folder=False)
    checked = dict(body)
    if dataset_file is not None:
        checked["dataset"] = _DATASET
    adapter_folder = _existing(path.parent, body.get("continue_from"), folder=True)
    if adapter_folder is not None:
        checked["continue_from"] = _ADAPTER
    try:
        request = TrainRequest.model_validate(checked)
    except ValidationError as error:
        findings = [
            FieldError(pointer_of(item["loc"]), item["msg"].removeprefix("Value error, "))
            for item in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise RequestInvalid(f"{path}: {findings[0].pointer}: {findings[0].message}", errors=findings) from error
    return Recipe(body, request, model_folder, dataset_file, adapter_folder)


def _existing(beside: Path, value: object, *, folder: bool) -> Path | None:
    """The path that a value names, if there is such a folder (or else file)."""
    if not isinstance(value, str) or value.startswith(("dat_", "mdl_", "adp_")):
        return None
    found = beside / Path(value).expanduser()
    exists = found.is_dir() if folder else found.is_file()
    return found.resolve() if exists else None
