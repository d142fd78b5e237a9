"""The leading singular vectors of a matrix, with random numbers that touch no one else's."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_SIDE = 2048
"""Up to this smaller side the whole decomposition is computed and cut."""
_OVERSAMPLING = 16
_ITERATIONS = 8


def truncated_svd(
    matrix: Tensor, rank: int, generator: torch.Generator, *, exact_side: int = EXACT_SIDE
) -> tuple[Tensor, Tensor, Tensor]:
    """U (m×r), S (r, descending) and Vᵀ (r×n) of an m×n matrix, in its precision.

    Large matrices are decomposed in a random subspace after power iterations (arXiv:0909.4061, algorithms 4.4 and 5.1).

    Args:
        rank: r, at most the smaller side.
        generator: a private one on the CPU, so that every device draws the same.
    """
    smaller = min(matrix.shape)
    if smaller <= exact_side or rank + _OVERSAMPLING >= smaller:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    width = rank + _OVERSAMPLING
    drawn = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float32)
    basis = torch.linalg.qr(matrix @ drawn.to(matrix)).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    u, s, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vt[:rank]
