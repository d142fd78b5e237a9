"""A training's recipe: a YAML file with the body of `POST /train`, in which files of this machine may be named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.cli.yaml_file import checked, existing, read_mapping
from app.schemas.train import TrainRequest

_DATASET = "dat_" + "0" * 32
_ADAPTER = "adp_" + "0" * 32


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


def read_recipe(path: Path, transferable: Path | None = None) -> Recipe:
    """Read and check a recipe; paths in it are relative to its own folder.

    Args:
        transferable: a file of its own with that part of the body.

    Raises:
        RequestInvalid: it is no YAML mapping, or a field is wrong; each finding with its place.
    """
    body = read_mapping(path, "Train an adapter")
    if transferable is not None:
        body["transferable"] = read_mapping(transferable, "Train an adapter")
    model_folder = existing(path.parent, body.get("base_model"), folder=True)
    dataset_file = existing(path.parent, body.get("dataset"), folder=False)
    document = dict(body)
    if dataset_file is not None:
        document["dataset"] = _DATASET
    adapter_folder = existing(path.parent, body.get("continue_from"), folder=True)
    if adapter_folder is not None:
        document["continue_from"] = _ADAPTER
    request = checked(path, TrainRequest, document)
    return Recipe(body, request, model_folder, dataset_file, adapter_folder)
