"""Rules on singular values and vectors, for matrices in a core frame.

In the full space of a weight matrix these rules act on directions that no adapter has: the mean over all singular
values, or the singular vectors of zeros, are then noise. In the core every direction is somebody's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from artifacts.algebra import small_svd, small_svd_of_rank

WELL_CONDITIONED = 1e-6
"""Squared singular values that are all above this × the largest are exact enough from XᵀX; it hides smaller ones."""


def separated(cores: Tensor, ranks: Sequence[int], weights: Tensor, cutoff: float) -> Tensor:
    """TSV-Merge (arXiv:2412.00081): U⊥·diag(wᵢσᵢ)·V⊥ᵀ of the matrices' singular triplets, U⊥ and V⊥ polar factors.

    Each matrix brings as many triplets as its adapter has components, all that it holds, when the core has room for
    them all; else the share rᵢ/Σr of the core's dimension, its largest first.

    Args:
        cores: (N, p, q); ranks: of the N adapters; weights: (N,).
        cutoff: what is rounding, relative to the largest singular value.

    Returns: (p, q).
    """
    room, total = min(cores.shape[1:]), sum(ranks)
    U, S, V = [], [], []
    for core, rank, weight in zip(cores, ranks, weights, strict=True):
        own_U, own_S, own_V = small_svd_of_rank(core, rank)
        # a triplet of a null direction would turn the others
        there = int((cutoff * own_S[:1] < own_S).sum())
        share = min(rank if total <= room else max(rank * room // total, 1), there)
        U.append(own_U[:, :share])
        S.append(own_S[:share] * weight)
        V.append(own_V[:, :share])
    return (polar(torch.cat(U, 1), cutoff) * torch.cat(S)) @ polar(torch.cat(V, 1), cutoff).T


def isotropic(core: Tensor, cutoff: float) -> Tensor:
    """Iso-C (arXiv:2502.04959): U·mean(σ)·Vᵀ of a matrix (p, q), over the directions that it has."""
    U, S, V = small_svd(core)
    there = cutoff * S[:1] < S
    if not bool(there.any()):
        return core
    return S[there].mean() * U[:, there] @ V[:, there].T


def isotropic_with_specifics(cores: Tensor, ranks: Sequence[int], common_fraction: float, cutoff: float) -> Tensor:
    """Iso-CTS (arXiv:2502.04959): common directions of the sum beside specific ones of each matrix, all of one size.

    Args:
        cores: (N, p, q), weights folded in; ranks: of the N adapters.
        common_fraction: share of the directions that are taken from the sum.
        cutoff: what is rounding, relative to the largest singular value.

    Returns: (p, q).
    """
    U, S, V = small_svd(cores.sum(0))
    directions = int((cutoff * S[:1] < S).sum())
    each = round((directions - int(directions * common_fraction)) / len(cores))
    common = max(directions - each * len(cores), 0)
    U, S, V = U[:, :common], S[:common], V[:, :common]
    parts_U, parts_S, parts_V = [U], [S], [V]
    for core, rank in zip(cores, ranks, strict=True):
        own_U, own_S, own_V = small_svd_of_rank(core - U @ (U.T @ core), rank)
        # an adapter of few components has fewer directions than its share; null vectors must not stand in for them
        share = min(each, int((cutoff * core.norm() < own_S).sum()))
        parts_U.append(own_U[:, :share])
        parts_S.append(own_S[:share])
        parts_V.append(own_V[:, :share])
    sizes = torch.cat(parts_S)
    return (
        (sizes.sum() / max(len(sizes), 1))
        * polar(torch.cat(parts_U, 1), cutoff)
        @ polar(torch.cat(parts_V, 1), cutoff).T
    )


def polar(X: Tensor, cutoff: float) -> Tensor:
    """P·Qᵀ of the SVD X = P·Σ·Qᵀ, X: (d, k) float64; directions that X does not have stay out."""
    if not X.numel():
        return X
    values, Q = torch.linalg.eigh(X.T @ X)
    result: Tensor
    if float(values[0]) > WELL_CONDITIONED * float(values[-1]):
        result = X @ (Q * values.rsqrt()) @ Q.T
        return result
    P, S, Qh = torch.linalg.svd(X, full_matrices=False)
    there = cutoff * S[0] < S
    result = P[:, there] @ Qh[there]
    return result
