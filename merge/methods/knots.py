"""KnOTS (arXiv:2410.19735): the deltas side by side have one SVD, [ΔW₁ … ΔW_N] = U·Σ·[V₁ᵀ … V_Nᵀ]; the parts ΣVᵢᵀ are
merged by a rule, and ΔW = U·merged.

From factors: with B = Q·T (T: n×n) the left basis comes from the n×n matrix T·blockdiag(AᵢAᵢᵀ)·Tᵀ, and
ΣVᵢᵀ = UᵀΔWᵢ = (UᵀBᵢ)·Aᵢ, an n×d_in block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from merge import rules
from merge.core import one_sign
from merge.gram import gram
from merge.peer_options import KnotsOptions
from merge.result import MergedModule
from merge.rows import DeltaRows, kth_size, largest, overflow
from merge.rules import compiled
from merge.stack import Stack

NULL = 1e-5
"""Directions with singular values below this are dropped, as in the official code, here relative to the largest."""


def merge(stack: Stack, options: KnotsOptions, rank: int) -> MergedModule:
    """Merge one module; B stays in the span of the adapters' B, A leaves that of their A (but with rule `sum`)."""
    basis, of_B = _left_basis(stack)
    signs = one_sign(of_B @ stack.A.sum(1).double())
    basis, of_B = basis * signs, (of_B * signs[:, None]).to(stack.A.dtype)
    parts = DeltaRows(
        tuple(stack.A[own] for _, own in stack.members),
        tuple(of_B[:, own].contiguous() for _, own in stack.members),
    )
    return _factored(stack, basis, _merged_parts(parts, stack, options) * options.scale, rank)


def _left_basis(stack: Stack) -> tuple[Tensor, Tensor]:
    """U of the deltas side by side as B·basis: (n, p), and UᵀB: (p, n); float64."""
    T, inverse = stack.triangular_B
    same_owner = stack.owners[:, None] == stack.owners
    squared, vectors = torch.linalg.eigh(T @ (stack.gram_A * same_owner) @ T.T)
    keep = squared > NULL**2 * squared[-1]
    keep[-1] = True
    U = vectors[:, keep]
    return inverse @ U, U.T @ T


def _merged_parts(parts: DeltaRows, stack: Stack, options: KnotsOptions) -> Tensor:
    """(p, d_in), of parts that are never there together: the part of one at a time, or a tile of all of them."""
    if options.rule == "sum":
        weights = stack.owner_weights.to(stack.A.dtype)
        return torch.cat([B * w for B, w in zip(parts.B, weights, strict=True)], 1) @ torch.cat(parts.A)
    if options.rule == "ties":
        return _elected(parts, stack.owner_weights, options)
    return _dropped(parts, stack, options)


def _elected(parts: DeltaRows, weights: Tensor, options: KnotsOptions) -> Tensor:
    """TIES: forming a tile twice costs less than writing it and reading it."""
    return parts.elected(weights, options.majority_sign_method, trimming(parts, options.density))


def trimming(parts: DeltaRows, density: float) -> rules.Window | None:
    """`rules.trimming` of parts that are there one at a time, or by tiles.

    Raises:
        MergeRefused: an entry is NaN, for the parts are too large for their dtype.
    """
    kept = rules.kept_count(density, parts.entries)
    if kept >= parts.entries:
        return None
    if kept == 0:
        borders = [math.inf] * len(parts.A)
    elif compiled(parts.A[0]):
        borders = [kth_size(part, kept) for part in parts.each()]
    else:
        # tiles are rounded in their own way: a border must be that of the entries it is compared with
        borders = [border for (border,) in largest(parts, lambda X: X, [[kept]] * len(parts.A))]
    lower = parts.A[0].new_tensor(borders)
    return rules.Window(lower, torch.full_like(lower, math.inf))


def _dropped(parts: DeltaRows, stack: Stack, options: KnotsOptions) -> Tensor:
    """DARE, with or without an election, tile by tile: whether an entry stays depends on its place alone."""
    keys, weights = rules.keys(stack, options.seed), stack.owner_weights / options.density
    result = parts.A[0].new_empty(parts.shape)
    for row, column, tile in parts.tiles():
        X = rules.erased(tile, keys, row, column, options.density) if options.density < 1 else tile
        if options.rule == "dare_ties":
            merged = rules.elected_sum(X, weights, options.majority_sign_method)
        else:
            merged = rules.weighted_sum(X, weights)
        result[row : row + tile.shape[1], column : column + tile.shape[2]] = merged
    return result


def _factored(stack: Stack, basis: Tensor, merged: Tensor, rank: int) -> MergedModule:
    """U·merged at min(rank, p) components, √σ on either side, from the p×p Gram matrix of the rows of `merged`.

    Raises:
        MergeRefused: `merged`, which is changed, overflows.
    """
    size = _power(merged)
    merged.div_(size)
    vectors = torch.linalg.eigh(gram(merged)).eigenvectors.flip(1)[:, :rank]
    rows = vectors.T.to(merged.dtype) @ merged
    root = rows.norm(dim=1).sqrt()
    A = torch.where(root[:, None] > 0, rows / root[:, None], 0.0) * math.sqrt(size)
    B = stack.B @ (basis @ (vectors * root * math.sqrt(size))).to(stack.B.dtype)
    return MergedModule(A, B, stack, None)


def _power(merged: Tensor) -> float:
    """A power of two near its largest |entry|: what is divided by it has squares that do not overflow, and no rounding.

    Raises:
        MergeRefused: an entry is not finite.
    """
    least, most = (float(border) for border in merged.aminmax())
    if not (math.isfinite(least) and math.isfinite(most)):
        raise overflow()
    return 4.0 ** max(math.frexp(max(-least, most))[1] // 2 - 1, -60)
