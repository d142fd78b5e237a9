"""The predictions of several branches become one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compose.scene import Prediction


def fuse(predictions: Sequence[Prediction], weights: Tensor) -> Prediction:
    """Σ_b W_b·ε_b, for either half.

    For a sampler whose step is affine in ε, with one latent and one noise for all branches, this is the same as fusing
    the latents after the step, as arXiv:2403.19776 words it.

    Args:
        weights: (branches, 1, H, W), summing to 1 over the branches.
    """
    cond = _weighted([item.cond for item in predictions], weights)
    halves = [item.uncond for item in predictions if item.uncond is not None]
    return Prediction(_weighted(halves, weights) if halves else None, cond)


def _weighted(parts: Sequence[Tensor], weights: Tensor) -> Tensor:
    return (torch.cat(list(parts)) * weights.to(parts[0])).sum(dim=0, keepdim=True)
