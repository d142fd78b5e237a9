"""A scene to compose: a YAML file with a body of `POST /compose-image`, which may name files of this machine."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.cli.yaml_file import checked, existing, read_mapping
from app.schemas.compose import CompareRequest, ComposeRequest

_ADAPTER = "adp_" + "0" * 32


@dataclass(frozen=True, slots=True)
class SceneFile:
    """A checked scene.

    Attributes:
        body: as the service takes it, but for the files.
        request: of several methods if the file names them.
        model_folder: the base model, if it is a folder of this machine; the image is then made here.
        adapters: what a value of `adapter` names, if it is a file or folder of this machine.
    """

    body: dict[str, Any]
    request: ComposeRequest | CompareRequest
    model_folder: Path | None
    adapters: dict[str, Path]


def read_scene(path: Path) -> SceneFile:
    """Read and check a scene; paths in it are relative to its own folder.

    Raises:
        RequestInvalid: it is no YAML mapping, or a field is wrong; each finding with its place.
    """
    body = read_mapping(path, "Compose an image")
    document = deepcopy(body)
    found: dict[str, Path] = {}
    for item in adapters_in(document):
        place = existing(path.parent, item.get("adapter"), folder=None)
        if place is not None:
            found[item["adapter"]] = place
            item["adapter"] = _ADAPTER
    request: ComposeRequest | CompareRequest = (
        checked(path, CompareRequest, document) if "methods" in body else checked(path, ComposeRequest, document)
    )
    return SceneFile(body, request, existing(path.parent, body.get("base_model"), folder=True), found)


def adapters_in(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a body that name an adapter, as far as it has the right form."""
    parts = [body.get(name) for name in ("concepts", "styles")]
    return [item for part in parts if isinstance(part, list) for item in part if isinstance(item, dict)]
