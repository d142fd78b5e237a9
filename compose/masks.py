"""Masks of the branches, from attention maps (arXiv:2403.19776)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from compose.options.masks import MaskOptions

_TINY = torch.finfo(torch.float32).tiny


def token_mask(maps: Tensor, tokens: Sequence[int], threshold: float, grid: tuple[int, int]) -> Tensor:
    """(h, w) of 0 and 1: cells where any token's map is above `threshold` times that map's own maximum.

    Args:
        maps: (h·w, tokens), row by row of the grid (h, w).
    """
    if not tokens:
        return torch.zeros(grid, device=maps.device)
    chosen = maps[:, list(tokens)].float()
    inside = chosen > threshold * chosen.amax(dim=0, keepdim=True)
    return inside.any(dim=1).reshape(grid).float()


def refined_mask(mask: Tensor, options: MaskOptions) -> Tensor:
    """(h, w), after those of dilation, erosion, opening and closing that are asked for, in this order."""
    if options.mask_dilate:
        mask = _dilated(mask)
    if options.mask_erode:
        mask = _eroded(mask)
    if options.mask_opening:
        mask = _dilated(_eroded(mask))
    if options.mask_closing:
        mask = _eroded(_dilated(mask))
    return mask


def _dilated(mask: Tensor) -> Tensor:
    return functional.max_pool2d(mask[None], kernel_size=3, stride=1, padding=1)[0]


def _eroded(mask: Tensor) -> Tensor:
    return 1 - _dilated(1 - mask)


def token_score(maps: Tensor, tokens: Sequence[int], grid: tuple[int, int]) -> Tensor:
    """(h, w) from 0 to 1: the largest attention of any token, each measured by its own maximum.

    A cell is in `token_mask` when its score is above the threshold.
    """
    chosen = maps[:, list(tokens)].float()
    return (chosen / chosen.amax(dim=0, keepdim=True).clamp_min(_TINY)).amax(dim=1).reshape(grid)


def concept_masks(
    maps: Tensor, tokens: Sequence[Sequence[int]], grid: tuple[int, int], options: MaskOptions, *, disjoint: bool
) -> Tensor:
    """(concepts, h, w) of 0 and 1, from the maps of one prompt that has all concepts.

    Args:
        maps: (h·w, tokens). tokens: of each concept.
        disjoint: a cell in several masks stays with the concept whose score is highest there; with all whose score is,
            as where several words have their largest attention.
    """
    masks = torch.stack(
        [refined_mask(token_mask(maps, item, options.mask_threshold, grid), options) for item in tokens]
    )
    if not disjoint:
        return masks
    scores = torch.stack([token_score(maps, item, grid) for item in tokens]).masked_fill(masks == 0, -1.0)
    return masks * (scores == scores.amax(dim=0, keepdim=True))


def branch_masks(
    maps: Sequence[Tensor],
    mask_tokens: Sequence[Sequence[int]],
    grid: tuple[int, int],
    options: MaskOptions,
) -> Tensor:
    """(branches, h, w) of 0 and 1 on the grid of the maps; before the background is given away.

    As `token_mask` of each branch, in one go.
    """
    places = [(branch, token) for branch, tokens in enumerate(mask_tokens) for token in tokens]
    if not places:
        return torch.zeros(len(maps), *grid, device=maps[0].device)
    chosen = torch.stack([maps[branch][:, token] for branch, token in places]).float()
    inside = chosen > options.mask_threshold * chosen.amax(dim=1, keepdim=True)
    owners = [[float(branch == own) for own, _ in places] for branch in range(len(maps))]
    masks = (torch.tensor(owners, device=inside.device) @ inside.float() > 0).float().reshape(-1, *grid)
    return torch.stack([refined_mask(mask, options) for mask in masks]) if options.refines_masks else masks


def mask_weights(masks: Tensor, size: tuple[int, int], *, base_branch: bool = True) -> Tensor:
    """(branches, 1, H, W), how much each branch counts at each latent pixel; they sum to 1 everywhere.

    Where no mask is, the base branch (the first) counts alone; with no base branch, all count alike. Where several are,
    these share alike.

    Args:
        masks: (branches, h, w). size: (H, W) of the latent.
    """
    empty = masks.sum(dim=0, keepdim=True) == 0
    filled = (
        torch.cat([torch.where(empty, 1.0, masks[:1]), masks[1:]]) if base_branch else torch.where(empty, 1.0, masks)
    )
    wide = filled[:, None]
    if wide.shape[2:] != size:
        wide = functional.interpolate(wide, size=size, mode="nearest")
    return wide / wide.sum(dim=0, keepdim=True)


def even_weights(branches: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """(branches, 1, H, W), all alike."""
    return torch.full((branches, 1, *size), 1 / branches, device=device)


def coverage(weights: Tensor) -> list[float]:
    """For each branch the fraction of latent pixels in which it counts."""
    return [float(share) for share in (weights > 0).float().mean(dim=(1, 2, 3))]
