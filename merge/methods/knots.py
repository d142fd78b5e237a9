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
from merge.brackets import overflow
from merge.coordinates import OfColumns
from merge.core import one_sign
from merge.entry_rule import EntryRule
from merge.gram import gram
from merge.peer_options import KnotsOptions
from merge.products import of_columns, of_rows
from merge.result import MergedModule
from merge.rows import DeltaRows, trimming
from merge.stack import Stack

NULL = 1e-5
"""Directions with singular values below this are dropped, as in the official code, here relative to the largest."""

SQUARED = 1e-12, 1e30
"""Rows whose largest squared norm is between these have inner products that neither overflow nor vanish."""


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
    """(p, d_in), of parts that are never there: to form an entry twice costs less than to write it and read it."""
    weights = stack.owner_weights
    if options.rule == "sum":
        scaled = [B * w for B, w in zip(parts.B, weights.to(stack.A.dtype), strict=True)]
        return torch.cat(scaled, 1) @ torch.cat(parts.A)
    if options.rule == "ties":
        window = trimming(parts, options.density)
        return parts.whole(EntryRule.elected_sum(weights, options.majority_sign_method, window))
    weights = weights / options.density
    elected = options.rule == "dare_ties"
    rule = EntryRule.elected_sum(weights, options.majority_sign_method) if elected else EntryRule.sum(weights)
    return parts.whole(rule.dropping(rules.keys(stack, options.seed), options.density))


def _factored(stack: Stack, basis: Tensor, merged: Tensor, rank: int) -> MergedModule:
    """U·merged at min(rank, p) components, √σ on either side, from the p×p Gram matrix of the rows of `merged`.

    Raises:
        MergeRefused: `merged`, which may be changed, overflows.
    """
    size, inner = 1.0, gram(merged)
    largest = float(inner.diagonal().max())
    if not SQUARED[0] < largest < SQUARED[1]:
        size = _power(merged)
        inner = gram(merged.div_(size))
    vectors = torch.linalg.eigh(inner).eigenvectors.flip(1)[:, :rank]
    rows = of_rows(vectors.T, merged)
    root = rows.norm(dim=1).sqrt()
    A = torch.where(root[:, None] > 0, rows / root[:, None], 0.0) * math.sqrt(size)
    left = basis @ (vectors * root * math.sqrt(size))
    coordinates = OfColumns(left, gram(A), (A @ stack.A.T).double())
    return MergedModule(A, of_columns(stack.B, left), stack, coordinates)


def _power(merged: Tensor) -> float:
    """A power of two near its largest |entry|: what is divided by it has squares that do not overflow, and no rounding.

    Raises:
        MergeRefused: an entry is not finite.
    """
    least, most = (float(border) for border in merged.aminmax())
    if not (math.isfinite(least) and math.isfinite(most)):
        raise overflow()
    return 4.0 ** max(math.frexp(max(-least, most))[1] // 2 - 1, -60)
