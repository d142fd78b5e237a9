"""The combinations of PEFT's `add_weighted_adapter` that treat A and B apart.

They are here to be compared with. B'·A' of summed factors has cross terms Bᵢ·Aⱼ that belong to no adapter, and it
depends on the order of the components in each file; the report's relative error says by how much.

With the raw factors of an adapter (scaling not folded in), c = √|w·s|: A' = f(sign(w·s)·c·A), B' = f(c·B).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from merge import rules
from merge.coordinates import Product
from merge.options import MergeOptions
from merge.peer_options import (
    FactorwiseDareOptions,
    FactorwiseDareTiesOptions,
    FactorwiseOptions,
    FactorwisePruneOptions,
    FactorwiseTiesOptions,
)
from merge.result import MergedModule
from merge.stack import Stack

Combine = Callable[[Sequence[Tensor], Tensor], Tensor]
"""Raw blocks of the owners and their weights (N,) → one block."""


def linear_factor(stack: Stack, options: FactorwiseOptions, rank: int) -> MergedModule:
    """`linear` of PEFT: the sum of the A's times the sum of the B's, which is B·K·A with a K that pairs places."""
    merged = _combined(stack, options, _sum, _sum)
    root, sign = stack.weights.abs().sqrt(), torch.where(stack.scalings < 0, -1.0, 1.0).to(stack.weights)
    turn = torch.where(stack.weights * stack.scalings < 0, -1.0, 1.0).to(stack.weights)
    paired = torch.nn.functional.one_hot(stack.places).to(root)
    coordinates = Product(paired * (options.scale * root * sign)[:, None], (paired * (root * turn)[:, None]).T)
    energy = options.scale**2 * stack.energy
    _, error = coordinates.measured(stack.gram_A, stack.gram_B, stack.weights * options.scale, energy)
    figures = {"cross_term_error": math.sqrt(error / energy)} if energy > 0 else {}
    return replace(merged, coordinates=coordinates, figures=figures)


def magnitude_prune(stack: Stack, options: FactorwisePruneOptions, rank: int) -> MergedModule:
    """`magnitude_prune` of PEFT: sums of the largest entries."""

    def combine(blocks: Sequence[Tensor], weights: Tensor) -> Tensor:
        return _sum([rules.trimmed(block, options.density) for block in blocks], weights)

    return _combined(stack, options, combine, combine)


def ties(stack: Stack, options: FactorwiseTiesOptions, rank: int) -> MergedModule:
    """`ties` of PEFT."""

    def combine(blocks: Sequence[Tensor], weights: Tensor) -> Tensor:
        kept = padded([rules.trimmed(block, options.density) for block in blocks])
        return rules.elected_sum(kept, weights, options.majority_sign_method)

    return _combined(stack, options, combine, combine)


def dare_linear(stack: Stack, options: FactorwiseDareOptions, rank: int) -> MergedModule:
    """`dare_linear` of PEFT."""
    of_A, of_B = _dropping(stack, options)
    return _combined(stack, options, lambda X, w: _sum(of_A(X), w), lambda X, w: _sum(of_B(X), w))


def dare_ties(stack: Stack, options: FactorwiseDareTiesOptions, rank: int) -> MergedModule:
    """`dare_ties` of PEFT."""
    of_A, of_B = _dropping(stack, options)
    election = options.majority_sign_method
    return _combined(
        stack,
        options,
        lambda X, w: rules.elected_sum(padded(of_A(X)), w, election),
        lambda X, w: rules.elected_sum(padded(of_B(X)), w, election),
    )


Drop = Callable[[Sequence[Tensor]], list[Tensor]]


def _dropping(stack: Stack, options: FactorwiseDareOptions) -> tuple[Drop, Drop]:
    """What masks the A's, and what masks the (transposed) B's with other numbers."""

    def drop(seeds: Sequence[int]) -> Drop:
        return lambda blocks: [
            rules.dropped(block, options.density, seed) for block, seed in zip(blocks, seeds, strict=True)
        ]

    return drop(rules.seeds(stack, options.seed)), drop(rules.seeds(stack, options.seed ^ (1 << 63)))


def _sum(blocks: Sequence[Tensor], weights: Tensor) -> Tensor:
    return rules.weighted_sum(padded(blocks), weights)


def padded(blocks: Sequence[Tensor]) -> Tensor:
    """(N, r, d) of blocks (rᵢ, d), zeros below; r is the largest."""
    rank = max(len(block) for block in blocks)
    return torch.stack([torch.nn.functional.pad(block, (0, 0, 0, rank - len(block))) for block in blocks])


def raw_factors(stack: Stack) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The owners' lora_A (rᵢ, d_in) and transposed lora_B (rᵢ, d_out) as in their files, and scalings (N,).

    Those of a scaling of 0 come back as zeros: nothing of them is left in a stack.
    """
    all_A, all_B = own_factors(stack)
    scalings = torch.stack([stack.scalings[own[0]] for _, own in stack.members])
    for A, B, scaling in zip(all_A, all_B, scalings.tolist(), strict=True):
        unfold = abs(scaling) ** -0.5 if scaling else 0.0
        A.mul_(unfold)
        B.mul_(unfold if scaling > 0 else -unfold)
    return all_A, all_B, scalings


def own_factors(stack: Stack) -> tuple[list[Tensor], list[Tensor]]:
    """Copies of the owners' A's (rᵢ, d_in) and transposed B's (rᵢ, d_out), scalings folded in, in file order."""
    all_A, all_B = [], []
    # transposed once, as a whole: columns one by one would read all of B for every owner
    transposed = stack.B.T.contiguous()
    for _, own in stack.members:
        rows = own[stack.places[own].argsort()]
        all_A.append(stack.A[rows])
        all_B.append(transposed[rows])
    return all_A, all_B


def _combined(stack: Stack, options: MergeOptions, combine_A: Combine, combine_B: Combine) -> MergedModule:
    all_A, all_B, scalings = raw_factors(stack)
    size = stack.owner_weights * scalings
    root = size.abs().sqrt()
    A = combine_A(all_A, root * torch.where(size < 0, -1.0, 1.0).to(root))
    B = combine_B(all_B, root).T
    gain = abs(options.scale) ** 0.5
    return MergedModule(A * gain, B * (gain if options.scale > 0 else -gain), stack, None)
