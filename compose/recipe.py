"""The recipe of an image: all that makes it again, as JSON, carried by the PNG itself. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.request import CompositionRequest

if TYPE_CHECKING:
    from PIL.Image import Image

LIBRARIES = ("rankwise", "torch", "diffusers", "peft", "transformers", "pillow")
KEY = "rankwise"
"""Keyword of the PNG's text chunk (iTXt) that holds the recipe."""
_COMPRESSION = 6


@dataclass(frozen=True, slots=True)
class Ingredient:
    """An adapter as a recipe names it.

    Attributes:
        id: within the service; None for a file.
        sha256: of the file of its weights.
    """

    id: str | None
    name: str
    sha256: str

    def to_dict(self) -> dict[str, str]:
        named = {} if self.id is None else {"id": self.id}
        return {**named, "name": self.name, "sha256": self.sha256}


def recipe_of(
    request: CompositionRequest,
    report: Mapping[str, Any],
    base: Mapping[str, Any],
    concepts: Sequence[Ingredient],
    styles: Sequence[Ingredient],
    *,
    precision: str,
    device: str,
) -> dict[str, Any]:
    """The recipe of a finished image.

    Args:
        report: of the composition: it has the values that the request left open.
        base: what is known of the base model.
        concepts, styles: in the request's order.
        precision, device: that it was computed with: others give an image that differs a little.
    """
    return {
        "base_model": dict(base),
        "concepts": [
            {"adapter": found.to_dict(), "trigger": item.trigger, "noun": item.noun, "weight": item.weight}
            for item, found in zip(request.concepts, concepts, strict=True)
        ],
        "styles": [
            {"adapter": found.to_dict(), "weight": item.weight}
            for item, found in zip(request.styles, styles, strict=True)
        ],
        "method": request.method,
        "parameters": report["parameters"],
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "width": report["width"],
        "height": report["height"],
        "steps": request.steps,
        "scheduler": report["scheduler"],
        "precision": precision,
        "device": device.partition(":")[0],
        "versions": {library: version(library) for library in LIBRARIES},
    }


def save_png(image: Image, path: Path, recipe: Mapping[str, Any]) -> None:
    """Write the image with its recipe. The same image and recipe give the same bytes."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(KEY, json.dumps(recipe, ensure_ascii=False, sort_keys=True))
    image.save(path, "PNG", pnginfo=info, compress_level=_COMPRESSION)


def read_recipe(path: Path) -> dict[str, Any] | None:
    """The recipe that a PNG carries; None if it has none."""
    from PIL import Image

    with Image.open(path) as image:
        text = image.info.get(KEY)
    return None if text is None else dict(json.loads(text))
