"""Rules on singular values and vectors, for matrices in a core frame.

In the full space of a weight matrix these rules act on directions that no adapter has: the mean over all singular
values, or the singular vectors of zeros, are then noise. In the core every direction is somebody's.

All of them end in orthonormal vectors and their singular values, so the SVD of a result comes with it. None of them
depends on the bases that the matrices are written in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from artifacts.algebra import Spectrum, small_svd, small_svd_of_rank

WELL_CONDITIONED = 1e-6
"""Squared singular values that are all above this × the largest are exact enough from XᵀX; it hides smaller ones."""

EVERY = slice(None)


def scaled(spectrum: Spectrum, factor: float) -> Spectrum:
    """The SVD of a matrix times a factor."""
    U, S, V = spectrum
    return Spectrum(U, S * abs(factor), -V if factor < 0 else V)


def separated(cores: Tensor, ranks: Sequence[int], weights: Tensor, cutoff: float, most: int | None = None) -> Spectrum:
    """TSV-Merge (arXiv:2412.00081): U⊥·diag(wᵢσᵢ)·V⊥ᵀ of the matrices' singular triplets, U⊥ and V⊥ polar factors.

    Each matrix brings as many triplets as its adapter has components, all that it holds, when the core has room for
    them all; else the share rᵢ/Σr of the core's dimension, its largest first.

    Args:
        cores: (N, p, q); ranks: of the N adapters; weights: (N,).
        cutoff: what is rounding, relative to the largest singular value.
        most: triplets of the result that are wanted, its largest; None: all.
    """
    room, total = min(cores.shape[1:]), sum(ranks)
    shares = [rank if total <= room else max(rank * room // total, 1) for rank in ranks]
    own = small_svd_of_rank(cores, max(ranks))
    # a triplet of a null direction would turn the others
    U, S, V = _leading(own, shares, cutoff * own.S[:, 0])
    sizes = torch.cat([part * weight for part, weight in zip(S, weights, strict=True)])
    if not len(sizes):
        return small_svd(torch.zeros_like(cores[0]))
    return _orthogonal(torch.cat(U, 1), sizes, torch.cat(V, 1), cutoff, most)


def isotropic(core: Spectrum, cutoff: float) -> Spectrum:
    """Iso-C (arXiv:2502.04959): U·mean(σ)·Vᵀ of a matrix (p, q), over the directions that it has, its largest first."""
    U, S, V = core
    there = max(int((cutoff * S[:1] < S).sum()), 1)
    return Spectrum(U[:, :there], S[:there].mean().expand(there), V[:, :there])


def isotropic_with_specifics(cores: Tensor, ranks: Sequence[int], common_fraction: float, cutoff: float) -> Spectrum:
    """Iso-CTS (arXiv:2502.04959): common directions of the sum beside specific ones of each matrix, all of one size.

    The common ones come first, in order of their singular values.

    Args:
        cores: (N, p, q), weights folded in; ranks: of the N adapters.
        common_fraction: share of the directions that are taken from the sum.
        cutoff: what is rounding, relative to the largest singular value.
    """
    U, S, V = small_svd(cores.sum(0))
    directions = int((cutoff * S[:1] < S).sum())
    each = round((directions - int(directions * common_fraction)) / len(cores))
    common = max(directions - each * len(cores), 0)
    U, S, V = U[:, :common], S[:common], V[:, :common]
    own = small_svd_of_rank(cores - U @ (U.T @ cores), max(ranks))
    # an adapter of few components has fewer directions than its share; null vectors must not stand in for them
    own_U, own_S, own_V = _leading(own, [each] * len(cores), cutoff * cores.flatten(1).norm(dim=1))
    sizes = torch.cat([S, *own_S])
    if not len(sizes):
        return small_svd(torch.zeros_like(cores[0]))
    return _orthogonal(torch.cat([U, *own_U], 1), sizes.mean().expand(len(sizes)), torch.cat([V, *own_V], 1), cutoff)


def _leading(own: Spectrum, shares: Sequence[int], borders: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of a batch of spectra the first triplets, each its share, whose singular values are above a border of its own."""
    there = (borders[:, None] < own.S).sum(1).tolist()
    counts = [min(share, count) for share, count in zip(shares, there, strict=True)]
    return (
        [U[:, :count] for U, count in zip(own.U, counts, strict=True)],
        [S[:count] for S, count in zip(own.S, counts, strict=True)],
        [V[:, :count] for V, count in zip(own.V, counts, strict=True)],
    )


def _orthogonal(U: Tensor, sizes: Tensor, V: Tensor, cutoff: float, most: int | None = None) -> Spectrum:
    """The SVD of U⊥·diag(sizes)·V⊥ᵀ, with the polar factors of U: (p, k) and V: (q, k); or its largest triplets."""
    order = sizes.abs().argsort(descending=True, stable=True)[:most]
    polar_U, whole_U = polar(U, cutoff, order)
    polar_V, whole_V = polar(V, cutoff, order)
    if not (whole_U and whole_V):
        return small_svd((polar(U, cutoff)[0] * sizes) @ polar(V, cutoff)[0].T)
    sizes = sizes[order]
    return Spectrum(polar_U, sizes.abs(), polar_V * torch.where(sizes < 0, -1.0, 1.0).to(sizes))


def polar(X: Tensor, cutoff: float, columns: Tensor | slice = EVERY) -> tuple[Tensor, bool]:
    """Columns of P·Qᵀ of the SVD X = P·Σ·Qᵀ, X: (d, k) float64, and whether X has k directions.

    Those that it lacks stay out.

    Args:
        columns: numbers of those that are wanted.
    """
    values, Q = torch.linalg.eigh(X.T @ X)
    if float(values[0]) > WELL_CONDITIONED * float(values[-1]):
        return X @ ((Q * values.rsqrt()) @ Q[columns].T), True
    P, S, Qh = torch.linalg.svd(X, full_matrices=False)
    there = cutoff * S[0] < S
    return P[:, there] @ Qh[there][:, columns], int(there.sum()) == X.shape[1]
