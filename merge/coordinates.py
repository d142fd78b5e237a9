"""A merged module in terms of the components that it is made of: K: (n, n) with ΔW' = B·K·A, or B·left of its factors.

K has as few parameters as the module has components of its own, so that n×n inner products measure it without a product
of n×n matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from artifacts.algebra import squared_norm

CANCELLED = 1e-6
"""An ‖error‖² below this part of ‖D‖² is measured by itself: as a difference of energies it would be rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class Diagonal:
    """K = diag(values), (n,) float64: another weight for each component."""

    values: Tensor

    def dense(self) -> Tensor:
        """(n, n)."""
        return torch.diag(self.values)

    def measured(self, gram_A: Tensor, gram_B: Tensor, weights: Tensor, energy: float) -> tuple[float, float]:
        """‖D'‖² and ‖D' − D‖² for D = B·diag(weights)·A, whose own ‖D‖² is `energy`."""
        products = gram_A * gram_B
        difference = self.values - weights
        return _positive(self.values @ products @ self.values), _positive(difference @ products @ difference)


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """K = left·right, (n, k) and (k, n) float64."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """(n, n)."""
        return self.left @ self.right

    def measured(self, gram_A: Tensor, gram_B: Tensor, weights: Tensor, energy: float) -> tuple[float, float]:
        """‖D'‖² and ‖D' − D‖² for D = B·diag(weights)·A, whose own ‖D‖² is `energy`.

        With P = G_B·L and Q = R·G_A these are tr(LᵀP·QRᵀ) and, for ⟨D', D⟩ = Σᵢ wᵢ·(P·Q)ᵢᵢ, ‖D'‖² − 2⟨D', D⟩ + ‖D‖².
        """
        of_B, of_A = gram_B @ self.left, self.right @ gram_A
        result = _positive(((self.left.T @ of_B) * (of_A @ self.right.T)).sum())
        shared = float(weights @ (of_B * of_A.T).sum(1))
        error = result - 2 * shared + energy
        if error < CANCELLED * energy:
            error = squared_norm(self.dense() - torch.diag(weights), gram_A, gram_B)
        return result, error


@dataclass(frozen=True, slots=True, eq=False)
class OfColumns:
    """ΔW' = B·left·A' with an A': (k, d_in) that leaves the span of the components, and is known by its inner products.

    Attributes:
        left: (n, k); inner: (k, k) A'A'ᵀ; across: (k, n) A'Aᵀ; float64.
    """

    left: Tensor
    inner: Tensor
    across: Tensor

    def measured(self, gram_A: Tensor, gram_B: Tensor, weights: Tensor, energy: float) -> tuple[float, float]:
        """‖D'‖² and ‖D' − D‖² for D = B·diag(weights)·A, whose own ‖D‖² is `energy`."""
        of_B = gram_B @ self.left
        result = _positive(((self.left.T @ of_B) * self.inner).sum())
        shared = float(weights @ (of_B * self.across.T).sum(1))
        return result, max(result - 2 * shared + energy, 0.0)


Coordinates = Diagonal | Product | OfColumns


def _positive(value: Tensor) -> float:
    return max(float(value), 0.0)
