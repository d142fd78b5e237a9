"""The best low-rank part of a residual that changes a little from one round to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from train.quantised.fisher_weights import RowColumnWeights

_POWER_ITERATIONS = 2


class LowRankFactors:
    """Gives L1 (d_out, r) and L2 (r, d_in), the best rank-r part of each residual that it is shown.

    Without oversampling by an exact SVD. With it in a random subspace of r + oversampling dimensions (arXiv:0909.4061);
    from the second residual on it begins at the subspace of the one before, where one iteration does as much as several
    from a random one.

    Args:
        oversampling: None for the exact SVD, which is taken as well where the subspace would be the whole space.
        weights: measure the error by diag(row)·E·diag(col) instead (arXiv:2311.12023, section 3.3).
        generator: a private one on the CPU.
    """

    def __init__(
        self,
        rank: int,
        *,
        oversampling: int | None,
        generator: torch.Generator,
        weights: RowColumnWeights | None = None,
    ) -> None:
        self._rank, self._oversampling, self._generator = rank, oversampling, generator
        self._weights = weights
        self._basis: Tensor | None = None

    def __call__(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        weighted = residual if self._weights is None else self._weights.applied(residual)
        u, s, vt = self._svd(weighted)
        roots = s.sqrt()
        left, right = u * roots, roots[:, None] * vt
        if self._weights is None:
            return left, right
        return left / self._weights.row[:, None], right / self._weights.col

    def _svd(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        smaller = min(matrix.shape)
        if self._oversampling is None or self._rank + self._oversampling >= smaller:
            u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
            return u[:, : self._rank], s[: self._rank], vt[: self._rank]
        if self._basis is None:
            width = self._rank + self._oversampling
            drawn = torch.randn(matrix.shape[1], width, generator=self._generator, dtype=torch.float32)
            start, iterations = drawn.to(matrix.device), _POWER_ITERATIONS
        else:
            start, iterations = self._basis, 0
        basis = torch.linalg.qr(matrix @ start).Q
        for _ in range(iterations):
            basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
        u, s, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        self._basis = vt.T
        return (basis @ u)[:, : self._rank], s[: self._rank], vt[: self._rank]
