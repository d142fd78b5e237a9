"""Losses that pull concepts into boxes (arXiv:2403.11627, with the numbers of the authors' code)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from compose.options.lora_composer import LoraComposerOptions

_SIGMA = 0.5
"""Of the 3×3 Gaussian that smooths maps."""


@dataclass(frozen=True, slots=True)
class BoxedConcept:
    """What the losses know of a concept.

    Attributes:
        mask: (h, w) of 0 and 1 on the grid of the maps, a filled rectangle.
        tokens: of its trigger and noun in its own prompt.
    """

    mask: Tensor
    tokens: tuple[int, ...]

    @property
    def rectangle(self) -> tuple[slice, slice]:
        """Rows and columns of the box."""
        rows, columns = (self.mask.amax(dim=axis).nonzero().flatten().tolist() for axis in (1, 0))
        return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def box_loss(
    maps: Sequence[Tensor], self_map: Tensor, concepts: Sequence[BoxedConcept], options: LoraComposerOptions
) -> Tensor:
    """The sum of three losses over all concepts.

    * foreground, of each token: weight·max(0, 1 − mean of the largest k of a·G in the box), G a bell over the box;
    * fill, of each token: weight·(mean over columns |max over rows of a·M − that of M| + the same with rows);
    * background: weight·mean of the largest k weights with which places in the box attend to places outside.

    k is `top_k` of the box's cells.

    Args:
        maps: of each concept's own words at all places, (h·w, tokens).
        self_map: (h·w, h·w), from each place to each.
    """
    terms = []
    for attention, concept in zip(maps, concepts, strict=True):
        inside = concept.mask.to(attention)
        k = max(1, int(options.top_k * float(inside.sum())))
        bell = _bell(concept).to(attention)
        for token in concept.tokens:
            cells = smoothed(attention[:, token].view(inside.shape))
            nearest = (cells * bell).flatten().topk(k).values.mean()
            terms.append(options.foreground_weight * (1 - nearest).clamp_min(0))
            terms.append(options.fill_weight * _unfilled(cells * inside, inside))
        within = inside.flatten() > 0
        if not bool(within.all()):
            leaks = self_map[within][:, ~within].flatten()
            terms.append(options.background_weight * leaks.topk(min(k, len(leaks))).values.mean())
    return torch.stack(terms).sum()


def _unfilled(cells: Tensor, inside: Tensor) -> Tensor:
    """How far the map's shadows on both sides are from those of the box."""
    return sum(
        (functional.l1_loss(cells.amax(dim=axis), inside.amax(dim=axis)) for axis in (0, 1)), start=cells.new_zeros(())
    )


def _bell(concept: BoxedConcept) -> Tensor:
    """(h, w): exp(−(x² + y²)/2) over the box, whose edges are at ±1, with 1 as its largest; 0 outside."""
    rows, columns = concept.rectangle
    y, x = (torch.linspace(-1, 1, part.stop - part.start) for part in (rows, columns))
    bell = torch.exp(-(y[:, None].square() + x[None].square()) / 2)
    found = torch.zeros_like(concept.mask, device="cpu")
    found[rows, columns] = bell / bell.amax()
    return found * concept.mask.cpu()


def smoothed(cells: Tensor) -> Tensor:
    """(h, w) after a Gaussian of 3×3; borders are mirrored."""
    line = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / (2 * _SIGMA**2)).to(cells)
    kernel = line[:, None] * line[None] / line.sum().square()
    mode = "reflect" if min(cells.shape) > 1 else "replicate"
    padded = functional.pad(cells[None, None], (1, 1, 1, 1), mode=mode)
    return functional.conv2d(padded, kernel[None, None])[0, 0]


def moved_noise(
    latents: Tensor, maps: Sequence[Tensor], concepts: Sequence[BoxedConcept], factor: int
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Latent re-initialisation: into each box goes the noise of the window of its size where the concept's words are
    attended to most. Mean and deviation of the whole stay.

    Args:
        latents: (1, c, H, W). maps: as in `box_loss`. factor: latent pixels a side of a cell of the maps.

    Returns:
        The latent, and row and column of each window's corner on the grid of the maps.
    """
    found, corners = latents.clone(), []
    for attention, concept in zip(maps, concepts, strict=True):
        rows, columns = concept.rectangle
        size = (rows.stop - rows.start, columns.stop - columns.start)
        score = attention[:, list(concept.tokens)].sum(dim=1).view(concept.mask.shape)
        sums = functional.avg_pool2d(score[None, None], size, stride=1)[0, 0]
        row, column = divmod(int(sums.argmax()), sums.shape[1])
        corners.append((row, column))
        source = _pixels(row, size[0], factor), _pixels(column, size[1], factor)
        target = _pixels(rows.start, size[0], factor), _pixels(columns.start, size[1], factor)
        found[..., target[0], target[1]] = latents[..., source[0], source[1]]
    return (found - found.mean()) / found.std() * latents.std() + latents.mean(), corners


def _pixels(start: int, length: int, factor: int) -> slice:
    return slice(start * factor, (start + length) * factor)
