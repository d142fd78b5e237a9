"""Several images side by side, each under its name. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

GAP = 8
MAX_COLUMNS = 4
_BACKGROUND, _INK = (255, 255, 255), (40, 40, 40)
_TEXT_SHARE = 16
"""A label's height is this part of an image's, within bounds."""
_SMALLEST_TEXT, _LARGEST_TEXT = 10, 28


def contact_sheet(images: Sequence[tuple[str, Image]]) -> Image:
    """A sheet of images of one size, at most four in a row; a label that is too wide is shortened.

    Args:
        images: label and image, at least one.
    """
    from PIL import Image as Pictures
    from PIL import ImageDraw, ImageFont

    width, height = images[0][1].size
    columns = min(MAX_COLUMNS, math.ceil(math.sqrt(len(images)))) if len(images) > MAX_COLUMNS else len(images)
    rows = math.ceil(len(images) / columns)
    size = min(max(height // _TEXT_SHARE, _SMALLEST_TEXT), _LARGEST_TEXT)
    band = size + GAP
    sheet = Pictures.new("RGB", (columns * (width + GAP) + GAP, rows * (height + band + GAP) + GAP), _BACKGROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size)
    for number, (label, image) in enumerate(images):
        row, column = divmod(number, columns)
        x, y = GAP + column * (width + GAP), GAP + row * (height + band + GAP)
        pen.text((x, y), _shortened(label, width, lambda words: pen.textlength(words, font=font)), _INK, font=font)
        sheet.paste(image.convert("RGB"), (x, y + band))
    return sheet


def _shortened(label: str, width: int, measure: Callable[[str], float]) -> str:
    if measure(label) <= width:
        return label
    shown = label
    while shown and measure(shown + "…") > width:
        shown = shown[:-1]
    return shown + "…"
