"""Compress then merge (arXiv:2606.03723): shared subspaces of the output rank, k×k coordinates, a rule on those.

The paper's abstract fixes this outline and that it is computed in the core space; how it chooses the subspaces is not
confirmed. Here they hold the most energy of all deltas together, max Σ ‖UᵀΔWᵢV‖²_F: the leading directions of either
side, improved in turn (higher-order orthogonal iteration of the stacked cores).
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge.core import CoreFrame, one_sign
from merge.methods.core_space import merged_core
from merge.peer_options import CtmOptions
from merge.result import MergedModule
from merge.stack import Stack

SETTLED = 1e-12
"""Relative gain of a sweep below which the subspaces have settled."""


def merge(stack: Stack, options: CtmOptions, rank: int) -> MergedModule:
    """Merge one module at min(rank, what its core has) components, by construction."""
    frame = CoreFrame.of(stack)
    cores = frame.cores()
    weighted = cores * stack.owner_weights[:, None, None]
    U, V = shared_subspaces(weighted, rank, options.sweeps)
    U, V = U * one_sign(U.T @ frame.row_sums), V * one_sign(V.T @ frame.column_sums)
    coordinates = U.T @ cores @ V
    merged = U @ merged_core(frame, coordinates, options) @ V.T
    total = float(weighted.square().sum())
    held = float((U.T @ weighted @ V).square().sum()) / total if total > 0 else 1.0
    return frame.merged(merged * options.scale, rank, {"energy_in_subspaces": held})


def shared_subspaces(cores: Tensor, rank: int, sweeps: int) -> tuple[Tensor, Tensor]:
    """U: (p, ≤ rank) and V: (q, ≤ rank) with orthonormal columns that hold much of Σ ‖UᵀMᵢV‖²_F; cores: (N, p, q)."""
    V = _leading(cores, rank)
    U = _leading(cores.mT, rank)
    held = 0.0
    for _ in range(sweeps):
        U = _leading((cores @ V).mT, rank)
        V = _leading(U.T @ cores, rank)
        now = float((U.T @ cores @ V).square().sum())
        if now - held <= SETTLED * now:
            break
        held = now
    return U, V


def _leading(matrices: Tensor, rank: int) -> Tensor:
    """Leading right singular directions (columns, ≤ rank) of matrices (N, rows, columns) on top of each other."""
    gram = (matrices.mT @ matrices).sum(0)
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors.flip(1)[:, :rank]
