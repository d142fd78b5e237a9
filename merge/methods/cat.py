"""Concatenation: the exact weighted sum Σ wᵢ·sᵢ·Bᵢ·Aᵢ at rank Σ rᵢ, as PEFT's `cat`."""

from __future__ import annotations

from merge.coordinates import Diagonal
from merge.options import MergeOptions
from merge.result import MergedModule
from merge.stack import Stack


def merge(stack: Stack, options: MergeOptions, rank: int) -> MergedModule:
    """Merge one module: A' stacks the rows wᵢ·aᵢ and B' the columns bᵢ. `rank` must be n, the size of the stack."""
    weights = stack.weights * options.scale
    # Half of the weight on either side keeps both factors at the size that training gave them.
    root = weights.abs().sqrt()
    A, B = stack.A, stack.B
    if not bool((weights == 1).all()):
        A, B = A * root[:, None].to(A.dtype), B * (root * weights.sign()).to(B.dtype)
    return MergedModule(A, B, stack, Diagonal(weights))
