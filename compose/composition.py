"""What comes out: reports of single steps while an image is made, and the image with its evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class StepReport:
    """A step that is done.

    Attributes:
        step: 1-based.
        preview: what the image looks like by now, when it is called during the report; costs a pass of the decoder.
    """

    step: int
    total: int
    preview: Callable[[], Image | None]


@dataclass(frozen=True, slots=True)
class Composition:
    """A finished image.

    Attributes:
        report: JSON: what ran, loss trace, coverage, counted passes, seconds, warnings.
        masks: by concept, (0-based step, greyscale picture of the image's size) at some of the steps.
        pictures: other evidence by name, such as overlays of the last masks.
    """

    image: Image
    report: Mapping[str, Any]
    masks: Mapping[str, list[tuple[int, Image]]] = field(default_factory=dict)
    pictures: Mapping[str, Image] = field(default_factory=dict)
