"""Task arithmetic on the deltas: λ·Σ wᵢ·ΔWᵢ (arXiv:2212.04089, eq. of task addition), exact or at a given rank.

Unlike the combination type of the same name in PEFT, which adds the A's and the B's apart, this has no cross terms
BᵢAⱼ. Components with one and the same a are added in b, which is exact too: adapters that share their lora_A, as those
of FFA-LoRA (arXiv:2403.12313) do, keep it and its rank.
"""

from __future__ import annotations

import torch

from merge.coordinates import Diagonal
from merge.methods import cat, svd
from merge.options import RankedOptions
from merge.result import MergedModule
from merge.stack import Stack

SAMPLED = 64
"""Entries of an a that are looked at before all of them are."""


def merge(stack: Stack, options: RankedOptions, rank: int) -> MergedModule:
    """Merge one module: exactly when `rank` can hold every different a, else truncated."""
    firsts, group = _same_a(stack)
    if rank < len(firsts):
        return svd.merge(stack, options, rank)
    if len(firsts) == stack.size:
        return cat.merge(stack, options, rank)
    weights = stack.weights * options.scale
    sums = torch.zeros(stack.size, len(firsts), dtype=torch.float64, device=group.device)
    sums[torch.arange(stack.size, device=group.device), group] = weights
    B = stack.B @ sums.to(stack.B.dtype)
    figures = {"shared_lora_A": _shared(stack, firsts, group)}
    # b_p·a of the group is b_p·a_p to the bit: in terms of the stack it is the plain weighted sum.
    return MergedModule(stack.A[firsts], B, stack, Diagonal(weights), figures=figures)


def _shared(stack: Stack, firsts: torch.Tensor, group: torch.Tensor) -> float:
    """The part of the components whose a is another adapter's too."""
    foreign = (stack.owners != stack.owners[firsts][group]).double()
    several = torch.zeros(len(firsts), dtype=torch.float64, device=group.device).index_add_(0, group, foreign) > 0
    return float(several[group].double().mean())


def _same_a(stack: Stack) -> tuple[torch.Tensor, torch.Tensor]:
    """(k,) the first component with each a, and (n,) to which of them each component belongs. Equal bit for bit.

    The order of a stack puts them side by side.
    """
    new = torch.ones(stack.size, dtype=torch.bool, device=stack.A.device)
    new[1:] = (stack.A[1:, :SAMPLED] != stack.A[:-1, :SAMPLED]).any(dim=1)
    alike = (~new).nonzero()[:, 0]
    if len(alike):
        new[alike] = (stack.A[alike] != stack.A[alike - 1]).any(dim=1)
    return new.nonzero()[:, 0], new.cumsum(0) - 1
