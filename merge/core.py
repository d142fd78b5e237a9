"""The core frame of a module: orthonormal bases of what its adapters span, and every ΔWᵢ as a small matrix in them.

U spans the columns of hstack(Bᵢ) and V those of vstack(Aᵢ)ᵀ, so that Mᵢ = Uᵀ·ΔWᵢ·V loses nothing and is at most n×n
(arXiv:2509.17786, eq. of the core matrix). The bases are the singular bases of the two stacks; rules that do not look
at single entries give the same in any orthonormal basis, and may have one that costs less. All of it comes from the n×n
Gram matrices; neither U nor V is ever formed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from artifacts.algebra import Spectrum, core_matrix, left_singular, small_svd
from merge.coordinates import Product
from merge.products import of_columns, of_rows
from merge.result import MergedModule
from merge.stack import Stack

RESOLVED = 2 * math.sqrt(torch.finfo(torch.float64).eps)
"""Of the largest, the singular values that `small_svd` tells from nothing: it works on their squares."""


def rounding_cutoff(size: int, dtype: torch.dtype) -> float:
    """Singular values below this, relative to the largest, are rounding: no rule may give their directions weight."""
    return max(2 * max(size, 32) * torch.finfo(dtype).eps, RESOLVED)


def one_sign(sums: Tensor) -> Tensor:
    """±1 for each direction, so that what the deltas sum up to along it is not negative.

    A direction of an SVD has no sign of its own, but a vote that ends even goes to plus.
    """
    return torch.where(sums < 0, -1.0, 1.0).to(sums)


@dataclass(frozen=True, slots=True, eq=False)
class CoreFrame:
    """Bases U = B·left: (d_out, p) and V = Aᵀ·right: (d_in, q) with what they make of each component. All float64.

    Attributes:
        stack: what it is the frame of.
        left: (n, p); right: (n, q).
        in_left: (p, n) coordinates Uᵀ·B of the columns of B; in_right: (q, n) coordinates Vᵀ·Aᵀ.
        plain: whether the bases are those of `Stack.core`.
    """

    stack: Stack
    left: Tensor
    right: Tensor
    in_left: Tensor
    in_right: Tensor
    plain: bool = False

    @property
    def cutoff(self) -> float:
        """Singular values below this × the largest are rounding."""
        return rounding_cutoff(self.stack.size, self.stack.A.dtype)

    @classmethod
    def of(cls, stack: Stack, singular: Literal["both", "left", "none"] = "both") -> Self:
        """In the singular bases: vectors in order of their singular values, each with the sign along which the deltas
        sum up to no less than 0. A side that need not be singular is in any orthonormal basis of the same span."""
        left = right = None
        if singular == "none":
            left = stack.plain_B
        if singular != "both":
            right = stack.plain_A
        in_left, of_B = left or _singular_basis(*stack.triangular_B, stack.B)
        in_right, of_A = right or _singular_basis(*stack.triangular_A, stack.A.T)
        frame = cls(stack, of_B, of_A, in_left, in_right, left is not None and right is not None)
        return frame._signed() if singular == "both" else frame

    def _signed(self) -> Self:
        """Each direction with the sign along which the deltas sum up to no less than 0."""
        left, right = one_sign(self.row_sums), one_sign(self.column_sums)
        in_left, in_right = self.in_left * left[:, None], self.in_right * right[:, None]
        return type(self)(self.stack, self.left * left, self.right * right, in_left, in_right)

    @property
    def row_sums(self) -> Tensor:
        """(p,) Uᵀ·ΣΔWᵢ·1."""
        return self.in_left @ self.stack.A.sum(1).double()

    @property
    def column_sums(self) -> Tensor:
        """(q,) Vᵀ·ΣΔWᵢᵀ·1."""
        return self.in_right @ self.stack.B.sum(0).double()

    def factors(self) -> tuple[Tensor, Tensor]:
        """(N, p, r) and (N, q, r) whose products leftᵢ·rightᵢᵀ are the Mᵢ; zeros stand for the ranks that some lack."""
        rank = max(self.stack.ranks)
        # an index past the last is a component of zeros
        places = torch.full((len(self.stack.members), rank), self.stack.size, device=self.left.device)
        for row, (_, own) in zip(places, self.stack.members, strict=True):
            row[: len(own)] = own
        left, right = (torch.nn.functional.pad(side, (0, 1))[:, places] for side in (self.in_left, self.in_right))
        return left.transpose(0, 1).contiguous(), right.transpose(0, 1).contiguous()

    def cores(self) -> Tensor:
        """(N, p, q) the Mᵢ of the owners, in the order of `Stack.members`, without their weights."""
        left, right = self.factors()
        return left @ right.mT

    def weighted_sum(self) -> Spectrum:
        """The SVD of Σ wᵢMᵢ of the owners, (p, q)."""
        if self.plain:
            return self.stack.core
        return small_svd(core_matrix(self.in_right, self.in_left, self.stack.weights))

    def merged(self, core: Spectrum, rank: int, figures: Mapping[str, float] | None = None) -> MergedModule:
        """The best approximation of U·core·Vᵀ at min(rank, its own numerical rank) as factors, √σ on either side.

        Of equal singular values the first stay.
        """
        kept = min(rank, max(int((self.cutoff * core.S[0] < core.S).sum()), 1))
        root = core.S[:kept].sqrt()
        left, right = self.left @ (core.U[:, :kept] * root), self.right @ (core.V[:, :kept] * root)
        A, B = of_rows(right.T, self.stack.A), of_columns(self.stack.B, left)
        return MergedModule(A, B, self.stack, Product(left, right.T), figures=figures or {})


def _singular_basis(T: Tensor, inverse: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """The coordinates of the columns of X: (d, n) in their singular basis, and second, such that this is X·second.

    Args:
        T, inverse: of `artifacts.algebra.triangular`.
    """
    U, S, projected = left_singular(T)
    kept = max(int((rounding_cutoff(len(T), X.dtype) * S[0] < S).sum()), 1)
    return projected[:kept], inverse @ U[:, :kept]
