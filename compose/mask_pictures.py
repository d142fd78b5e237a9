"""Masks as pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

_COLOURS = ((230, 60, 60), (50, 110, 230), (60, 170, 80), (235, 165, 30), (150, 70, 200), (20, 170, 180))
_STRENGTH = 0.45


def mask_picture(mask: Tensor, size: tuple[int, int]) -> Image.Image:
    """A mask (h, w) from 0 to 1 in black and white, of (width, height) pixels."""
    values = (mask.detach().float().clamp(0, 1) * 255).round().to("cpu").numpy().astype(np.uint8)
    return Image.fromarray(values, "L").resize(size, Image.Resampling.NEAREST)


def overlay(image: Image.Image, masks: Sequence[Tensor]) -> Image.Image:
    """The image with every mask in a colour of its own."""
    shown: NDArray[np.float32] = np.asarray(image.convert("RGB"), dtype=np.float32)
    for index, mask in enumerate(masks):
        inside = np.asarray(mask_picture(mask, image.size), dtype=np.float32)[..., None] * np.float32(_STRENGTH / 255)
        colour = np.array(_COLOURS[index % len(_COLOURS)], dtype=np.float32)
        shown = np.asarray(shown * (1 - inside) + colour * inside, dtype=np.float32)
    return Image.fromarray(shown.round().astype(np.uint8), "RGB")
