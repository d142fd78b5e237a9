"""KnOTS (arXiv:2410.19735): the deltas side by side have one SVD, [ΔW₁ … ΔW_N] = U·Σ·[V₁ᵀ … V_Nᵀ]; the parts ΣVᵢᵀ are
merged by a rule, and ΔW = U·merged.

From factors: with B = Q·T (T: n×n) the left basis comes from the n×n matrix T·blockdiag(AᵢAᵢᵀ)·Tᵀ, and
ΣVᵢᵀ = UᵀΔWᵢ = (UᵀBᵢ)·Aᵢ, an n×d_in block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from artifacts.algebra import gram, triangular
from merge import rules
from merge.core import one_sign
from merge.peer_options import KnotsOptions
from merge.result import MergedModule
from merge.rows import DeltaRows, kth_size
from merge.rules import compiled
from merge.stack import Stack

NULL = 1e-5
"""Directions with singular values below this are dropped, as in the official code, here relative to the largest."""


def merge(stack: Stack, options: KnotsOptions, rank: int) -> MergedModule:
    """Merge one module; B stays in the span of the adapters' B, A leaves that of their A (but with rule `sum`)."""
    basis, of_B = _left_basis(stack)
    signs = one_sign(of_B @ stack.A.sum(1, dtype=torch.float64))
    basis, of_B = basis * signs, (of_B * signs[:, None]).to(stack.A.dtype)
    parts = DeltaRows(
        tuple(stack.A[own] for _, own in stack.members),
        tuple(of_B[:, own].contiguous() for _, own in stack.members),
    )
    return _factored(stack, basis, _merged_parts(parts, stack, options) * options.scale, rank)


def _left_basis(stack: Stack) -> tuple[Tensor, Tensor]:
    """U of the deltas side by side as B·basis: (n, p), and UᵀB: (p, n); float64."""
    T, inverse = triangular(stack.B, stack.gram_B)
    same_owner = stack.owners[:, None] == stack.owners
    squared, vectors = torch.linalg.eigh(T @ (stack.gram_A * same_owner) @ T.T)
    keep = squared > NULL**2 * squared[-1]
    keep[-1] = True
    U = vectors[:, keep]
    return inverse @ U, U.T @ T


def _merged_parts(parts: DeltaRows, stack: Stack, options: KnotsOptions) -> Tensor:
    weights = stack.owner_weights
    if options.rule == "ties" and compiled(stack.A):
        return _elected(parts, weights, options)
    X = torch.stack([part.clone() for part in parts.each()])
    if options.rule in ("dare", "dare_ties"):
        seeds = rules.seeds(stack, options.seed)
        X = torch.stack([rules.dropped(part, options.density, seed) for part, seed in zip(X, seeds, strict=True)])
    if options.rule in ("ties", "dare_ties"):
        window = rules.trimming(X, options.density, parts.entries) if options.rule == "ties" else None
        return rules.elected_sum(X, weights, options.majority_sign_method, window)
    return rules.weighted_sum(X, weights)


def _elected(parts: DeltaRows, weights: Tensor, options: KnotsOptions) -> Tensor:
    """TIES of parts that are never there together: forming a tile twice costs less than writing it and reading it."""
    return parts.elected(weights, options.majority_sign_method, trimming(parts, options.density))


def trimming(parts: DeltaRows, density: float) -> rules.Window | None:
    """`rules.trimming` of parts that are there one at a time.

    Raises:
        MergeRefused: an entry is NaN, for the parts are too large for their dtype.
    """
    kept = rules.kept_count(density, parts.entries)
    if not 0 < kept < parts.entries:
        return rules.trimming(parts.each(), density, parts.entries)
    lower = torch.tensor([kth_size(part, kept) for part in parts.each()])
    return rules.Window(lower, torch.full_like(lower, math.inf))


def _factored(stack: Stack, basis: Tensor, merged: Tensor, rank: int) -> MergedModule:
    """U·merged at min(rank, p) components, √σ on either side, from the p×p Gram matrix of the rows of `merged`."""
    vectors = torch.linalg.eigh(gram(merged)).eigenvectors.flip(1)[:, :rank]
    rows = vectors.T.to(merged.dtype) @ merged
    root = rows.norm(dim=1).sqrt()
    A = torch.where(root[:, None] > 0, rows / root[:, None], 0.0)
    B = stack.B @ (basis @ (vectors * root)).to(stack.B.dtype)
    return MergedModule(A, B, stack, None)
