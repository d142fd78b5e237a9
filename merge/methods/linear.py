"""Task arithmetic on the deltas: λ·Σ wᵢ·ΔWᵢ (arXiv:2212.04089, eq. of task addition), exact or at a given rank.

Unlike the combination type of the same name in PEFT, which adds the A's and the B's apart, this has no cross terms
BᵢAⱼ.
"""

from __future__ import annotations

from merge.methods import cat, svd
from merge.options import RankedOptions
from merge.result import MergedModule
from merge.stack import Stack


def merge(stack: Stack, options: RankedOptions, rank: int) -> MergedModule:
    """Merge one module: concatenated when `rank` can hold every component, else truncated."""
    return cat.merge(stack, options, rank) if rank >= stack.size else svd.merge(stack, options, rank)
