"""RobustMerge (arXiv:2502.17159): prune both factors by size, and scale each component by what its row of A lost.

Official code and a public port disagree: the one sums the factors (`robustmerge`, with the cross terms of every method
that does), the other sums the products (`robustmerge_product`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from artifacts.algebra import core_svd, truncated_factors
from merge import rules
from merge.gram import gram
from merge.methods.factorwise import own_factors, padded
from merge.peer_options import RobustMergeOptions, RobustMergeProductOptions
from merge.result import MergedModule
from merge.stack import Stack


def robustmerge(stack: Stack, options: RobustMergeOptions, rank: int) -> MergedModule:
    """The official code: A' = c·Σ Ãᵢ, B' = c·Σ wᵢ·zᵢ∘B̃ᵢ / Σ zᵢ with component scales zᵢ: (r,)."""
    pruned_A, pruned_B, scales = _pruned(stack, options)
    z = padded([scale[:, None] for scale in scales])
    weights = stack.owner_weights.to(z.dtype)
    A = padded(pruned_A).sum(0) * options.coefficient
    B = (weights[:, None, None] * z * padded(pruned_B)).sum(0) / z.sum(0) * options.coefficient
    return MergedModule(A, B.T * options.scale, stack, None)


def robustmerge_product(stack: Stack, options: RobustMergeProductOptions, rank: int) -> MergedModule:
    """The port: c·Σ wᵢ·B̃ᵢ·diag(zᵢ/Σⱼ zⱼ)·Ãᵢ, truncated to the rank."""
    pruned_A, pruned_B, scales = _pruned(stack, options)
    total = padded([scale[:, None] for scale in scales]).sum(0)[:, 0]
    factor = options.coefficient * options.scale
    sizes = [
        scale / total[: len(scale)] * (float(weight) * factor)
        for scale, weight in zip(scales, stack.owner_weights, strict=True)
    ]
    A, rows_of_B, weights = torch.cat(pruned_A), torch.cat(pruned_B), torch.cat(sizes).double()
    B = rows_of_B.T
    svd = core_svd(A, B, weights, gram(A), gram(rows_of_B))
    low_A, low_B = truncated_factors(A, B, svd, rank)
    return MergedModule(low_A, low_B, stack, None)


def _pruned(
    stack: Stack, options: RobustMergeOptions | RobustMergeProductOptions
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Pruned A's (rᵢ, d_in) and transposed B's (rᵢ, d_out), √|s| folded into either, and the scales zᵢ: (rᵢ,)."""
    pruned_A, pruned_B, scales = [], [], []
    # A folded scaling changes neither which entries of an adapter are its largest nor what part of a row they are.
    for A, B in zip(*own_factors(stack), strict=True):
        kept = rules.trimmed(A, options.density)
        pruned_A.append(kept)
        pruned_B.append(rules.trimmed(B, options.density))
        scales.append(component_scales(A, kept, options.tail))
    return pruned_A, pruned_B, scales


def component_scales(A: Tensor, kept: Tensor, tail: float) -> Tensor:
    """(r,) Σ|row of A| / Σ|what was kept of it|, raised to at least its own sorted value at index ⌊(1 − tail)·r⌋.

    A row of which nothing was kept does nothing, and takes the largest scale of the others.
    """
    before, after = A.abs().sum(1), kept.abs().sum(1)
    there = after > 0
    ratio = torch.where(there, before / after, 0.0)
    largest = ratio.max() if bool(there.any()) else torch.ones_like(ratio[0])
    ratio = torch.where(there, ratio, largest)
    ordered = ratio.sort().values
    least = ordered[min(int(len(ordered) * (1 - tail)), len(ordered) - 1)]
    return ratio.clamp_min(float(least))
