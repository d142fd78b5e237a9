"""Compress then merge (arXiv:2606.03723): shared subspaces of the output rank, k×k coordinates, a rule on those.

The paper's abstract fixes this outline and that it is computed in the core space; how it chooses the subspaces is not
confirmed. Here they hold the most energy of all deltas together, max Σ ‖UᵀΔWᵢV‖²_F: the leading directions of either
side, improved in turn (orthogonal iteration on the stacked cores).
"""

from __future__ import annotations

import torch
from torch import Tensor

from artifacts.algebra import Spectrum
from merge import spectral
from merge.core import CoreFrame, one_sign
from merge.methods.core_space import merged_core
from merge.peer_options import CtmOptions
from merge.result import MergedModule
from merge.stack import Stack

SETTLED = 1e-12
"""Relative gain of a sweep below which the subspaces have settled."""


def merge(stack: Stack, options: CtmOptions, rank: int) -> MergedModule:
    """Merge one module at min(rank, what its core has) components, by construction."""
    frame = CoreFrame.of(stack, "none")
    left, right = frame.factors()
    U, V = shared_subspaces(left * stack.owner_weights[:, None, None], right, rank, options.sweeps)
    if options.rule == "ties":
        U, V = U * one_sign(U.T @ frame.row_sums), V * one_sign(V.T @ frame.column_sums)
    coordinates = (U.T @ left) @ (V.T @ right).mT
    inner = merged_core(frame, coordinates, options)
    merged = Spectrum(U @ inner.U, inner.S, V @ inner.V)
    squared = stack.owner_weights.square()
    total = float(squared @ stack.products.diagonal())
    held = float(squared @ coordinates.square().sum((1, 2))) / total if total > 0 else 1.0
    return frame.merged(spectral.scaled(merged, options.scale), rank, {"energy_in_subspaces": held})


def shared_subspaces(left: Tensor, right: Tensor, rank: int, sweeps: int) -> tuple[Tensor, Tensor]:
    """U: (p, ≤ rank) and V: (q, ≤ rank) with orthonormal columns that hold much of Σ ‖UᵀMᵢV‖²_F, Mᵢ = leftᵢ·rightᵢᵀ.

    A sweep multiplies U by Σ MᵢVVᵀMᵢᵀ, and then V by Σ MᵢᵀUUᵀMᵢ, and makes the columns orthonormal again. Neither loses
    energy, and where they have settled each is a leading subspace for the other.

    Args:
        left: (N, p, r); right: (N, q, r).
    """
    U, V = _leading(left, right, rank), _leading(right, left, rank)
    wide_left, wide_right = (side.transpose(0, 1).flatten(1) for side in (left, right))

    def inside(wide: Tensor, vectors: Tensor) -> Tensor:
        return (wide.T @ vectors).view(len(left), -1, vectors.shape[1])

    def multiplied(wide: Tensor, of_other: Tensor, coordinates: Tensor) -> Tensor:
        product: Tensor = torch.linalg.qr(wide @ (of_other @ coordinates).flatten(0, 1)).Q
        return product

    of_U, of_V = inside(wide_left, U), inside(wide_right, V)
    coordinates = of_U.mT @ of_V
    held = 0.0
    for _ in range(sweeps):
        U = multiplied(wide_left, of_V, coordinates.mT)
        of_U = inside(wide_left, U)
        V = multiplied(wide_right, of_U, of_U.mT @ of_V)
        of_V = inside(wide_right, V)
        coordinates = of_U.mT @ of_V
        now = float(coordinates.square().sum())
        if now - held <= SETTLED * now:
            break
        held = now
    if sweeps:
        U, V = U @ _axes(coordinates.mT), V @ _axes(coordinates)
    return U, V


def _leading(side: Tensor, other: Tensor, rank: int) -> Tensor:
    """(p, ≤ rank) leading left singular directions of the matrices sideᵢ·otherᵢᵀ side by side; side: (N, p, r)."""
    gram = ((side @ (other.mT @ other)) @ side.mT).sum(0)
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors.flip(1)[:, :rank]


def _axes(matrices: Tensor) -> Tensor:
    """(k, k) right singular directions of matrices (N, rows, k) on top of each other, the leading first."""
    vectors: Tensor = torch.linalg.eigh((matrices.mT @ matrices).sum(0)).eigenvectors
    return vectors.flip(1)
