"""The core frame of a module: orthonormal bases of what its adapters span, and every ΔWᵢ as a small matrix in them.

U spans the columns of hstack(Bᵢ) and V those of vstack(Aᵢ)ᵀ, so that Mᵢ = Uᵀ·ΔWᵢ·V loses nothing and is at most n×n
(arXiv:2509.17786, eq. of the core matrix). The bases are the singular bases of the two stacks. All of it comes from the
n×n Gram matrices; neither U nor V is ever formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from artifacts.algebra import small_svd, triangular
from merge.result import MergedModule
from merge.stack import Stack


def rounding_cutoff(size: int, dtype: torch.dtype) -> float:
    """Singular values below this, relative to the largest, are rounding: no rule may give their directions weight."""
    return 2 * max(size, 32) * torch.finfo(dtype).eps


def one_sign(sums: Tensor) -> Tensor:
    """±1 for each direction, so that what the deltas sum up to along it is not negative.

    A direction of an SVD has no sign of its own, but a vote that ends even goes to plus.
    """
    return torch.where(sums < 0, -1.0, 1.0).to(sums)


@dataclass(frozen=True, slots=True, eq=False)
class CoreFrame:
    """Bases U = B·left: (d_out, p) and V = Aᵀ·right: (d_in, q) with what they make of each component. All float64.

    Each direction has the sign along which the deltas sum up to no less than 0.

    Attributes:
        stack: what it is the frame of.
        left: (n, p); right: (n, q).
        in_left: (p, n) coordinates Uᵀ·B of the columns of B; in_right: (q, n) coordinates Vᵀ·Aᵀ.
    """

    stack: Stack
    left: Tensor
    right: Tensor
    in_left: Tensor
    in_right: Tensor

    @property
    def cutoff(self) -> float:
        """Singular values below this × the largest are rounding."""
        return rounding_cutoff(self.stack.size, self.stack.A.dtype)

    @classmethod
    def of(cls, stack: Stack) -> Self:
        left, in_left = _basis(stack.B, stack.gram_B)
        right, in_right = _basis(stack.A.T, stack.gram_A)
        frame = cls(stack, left, right, in_left, in_right)
        of_left, of_right = one_sign(frame.row_sums), one_sign(frame.column_sums)
        return cls(stack, left * of_left, right * of_right, in_left * of_left[:, None], in_right * of_right[:, None])

    @property
    def row_sums(self) -> Tensor:
        """(p,) Uᵀ·ΣΔWᵢ·1."""
        return self.in_left @ self.stack.A.sum(1, dtype=torch.float64)

    @property
    def column_sums(self) -> Tensor:
        """(q,) Vᵀ·ΣΔWᵢᵀ·1."""
        return self.in_right @ self.stack.B.sum(0, dtype=torch.float64)

    def cores(self) -> Tensor:
        """(N, p, q) the Mᵢ of the owners, in the order of `Stack.members`, without their weights."""
        return torch.stack([self.in_left[:, own] @ self.in_right[:, own].T for _, own in self.stack.members])

    def merged(self, core: Tensor, rank: int, figures: Mapping[str, float] | None = None) -> MergedModule:
        """The best approximation of U·core·Vᵀ at min(rank, its own numerical rank) as factors, √σ on either side."""
        U, S, V = small_svd(core)
        kept = min(rank, max(int((self.cutoff * S[0] < S).sum()), 1))
        root = S[:kept].sqrt()
        left, right = self.left @ (U[:, :kept] * root), self.right @ (V[:, :kept] * root)
        A = right.T.to(self.stack.A.dtype) @ self.stack.A
        B = self.stack.B @ left.to(self.stack.B.dtype)
        return MergedModule(A, B, self.stack, left @ right.T, figures=figures or {})


def _basis(X: Tensor, gram_X: Tensor) -> tuple[Tensor, Tensor]:
    """Singular basis of the columns of X: (d, n) as X·first, and second, the coordinates of the columns in it."""
    T, inverse = triangular(X, gram_X)
    U, S, _ = small_svd(T)
    keep = rounding_cutoff(len(T), X.dtype) * S[0] < S
    keep[0] = True
    return inverse @ U[:, keep], U[:, keep].T @ T
