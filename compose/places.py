"""Boxes and masks of the user's on the grid of a latent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from artifacts.errors import ComposeRefused, FieldError
from compose.options.places import Box, Place
from compose.png_mask import read_mask
from compose.regions import Size


def place_mask(place: Place, size: Size, pointer: str) -> Tensor:
    """(h, w) of 0 and 1: cells whose centre is in a box, or of which at least half is white in the mask.

    Raises:
        ComposeRefused: it covers no cell.
    """
    if place.png is not None:
        mask = _png_mask(place.png, size)
    else:
        mask = torch.stack([box_mask(box, size) for box in place.boxes or ()]).amax(dim=0)
    if not bool(mask.any()):
        message = f"covers no pixel of the latent, which has {size[1]}×{size[0]}; make it larger"
        raise ComposeRefused(f"The place at {pointer} {message}.", errors=[FieldError(pointer, message)])
    return mask


def box_mask(box: Box, size: Size) -> Tensor:
    """(h, w) of 0 and 1: cells whose centre is inside."""
    rows, columns = ((torch.arange(side, dtype=torch.float64) + 0.5) / side for side in size)
    inside_rows = (rows >= box.top) & (rows < box.bottom)
    inside_columns = (columns >= box.left) & (columns < box.right)
    return (inside_rows[:, None] & inside_columns[None]).float()


def _png_mask(text: str, size: Size) -> Tensor:
    small = read_mask(text).resize((size[1], size[0]), Image.Resampling.BOX)
    return torch.from_numpy((np.asarray(small) >= 128).astype(np.float32))


def blend_weights(masks: Sequence[Tensor], rho: float) -> Tensor:
    """(1 + concepts, 1, h, w), the base's first: W_i = ρ·M_i / max(1, Σ M), W_0 = 1 − Σ W_i.

    Inside one mask this is (1 − ρ)·ε_base + ρ·ε_i (arXiv:2403.10983); where masks meet, they share ρ alike.
    """
    inside = torch.stack(list(masks))
    shares = rho * inside / inside.sum(dim=0, keepdim=True).clamp_min(1.0)
    return torch.cat([1 - shares.sum(dim=0, keepdim=True), shares])[:, None]
