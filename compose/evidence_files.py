"""An image and its evidence as files of a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from artifacts.svg import MEDIA_TYPE
from compose.composition import Composition
from compose.loss_trace import draw
from compose.recipe import save_png

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE = "image.png"
TRACE = "loss.svg"
MAX_NAME = 40


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file, and what it shows: of a mask the concept and the 0-based step."""

    path: Path
    role: Literal["image", "mask", "picture"]
    media_type: str = "image/png"
    details: Mapping[str, Any] = field(default_factory=dict)


def write_files(found: Composition, recipe: Mapping[str, Any], folder: Path) -> list[WrittenFile]:
    """Write the image with its recipe, then masks and other pictures; the image comes first."""
    folder.mkdir(parents=True)
    save_png(found.image, folder / IMAGE, recipe)
    files = [WrittenFile(folder / IMAGE, "image")]
    for number, (concept, masks) in enumerate(found.masks.items(), 1):
        for step, picture in masks:
            path = folder / f"mask-{number}-{_slug(concept)}-step-{step}.png"
            _save(picture, path)
            files.append(WrittenFile(path, "mask", details={"concept": concept, "step": step}))
    for name, picture in found.pictures.items():
        path = folder / f"{_slug(name)}.png"
        _save(picture, path)
        files.append(WrittenFile(path, "picture", details={"shows": name}))
    updates = found.report.get("updates")
    if updates:
        path = folder / TRACE
        path.write_text(draw(updates), encoding="utf-8")
        files.append(WrittenFile(path, "picture", MEDIA_TYPE, {"shows": "loss of the updates"}))
    return files


def _save(picture: Image, path: Path) -> None:
    picture.save(path, "PNG")


def _slug(name: str) -> str:
    """A part of a file name that every system takes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:MAX_NAME].strip("-") or "x"
