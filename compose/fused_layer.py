"""Gradient fusion of one layer (arXiv:2305.18292): D = argmin Σᵢ ‖(ΔWᵢ − D)·Xᵢ‖²_F, from XᵢXᵢᵀ alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class LayerProblem:
    """What is known of a layer, in float64: the objective is tr(D·C·Dᵀ) − 2·tr(D·Gᵀ) + constant.

    Attributes:
        C: (d_in, d_in), Σ Cᵢ with Cᵢ = XᵢXᵢᵀ.
        G: (d_out, d_in), Σ ΔWᵢCᵢ.
        constant: Σ tr(ΔWᵢCᵢΔWᵢᵀ).
    """

    C: Tensor
    G: Tensor
    constant: float = 0.0

    @classmethod
    def empty(cls, d_out: int, d_in: int) -> LayerProblem:
        return cls(torch.zeros(d_in, d_in, dtype=torch.float64), torch.zeros(d_out, d_in, dtype=torch.float64))

    def add(self, delta: Tensor, gram: Tensor) -> None:
        """An adapter: its ΔW (d_out, d_in), zero where it does not have the layer, and its XXᵀ (d_in, d_in)."""
        delta, gram = delta.double(), gram.double()
        product = delta @ gram
        self.C += gram
        self.G += product
        self.constant += float((product * delta).sum())

    def objective(self, D: Tensor) -> float:
        """Σᵢ ‖(ΔWᵢ − D)·Xᵢ‖²_F, not below 0."""
        D = D.double()
        return max(0.0, float(((D @ self.C) * D).sum() - 2 * (D * self.G).sum()) + self.constant)

    def closed_form(self, ridge: float) -> Tensor:
        """G·(C + λI)⁻¹ with λ = ridge × the mean of C's diagonal.

        By eigenvectors: of a C of lower rank, rounding leaves eigenvalues just below 0.
        """
        scale = float(self.C.diagonal().mean())
        if not scale:
            return torch.zeros_like(self.G)
        values, vectors = torch.linalg.eigh(self.C)
        found: Tensor = (self.G @ vectors) / (values.clamp_min(0) + ridge * scale) @ vectors.T
        return found

    def descended(self, iterations: int) -> Tensor:
        """By LBFGS from D = 0: learning rate 1, history 25, strong Wolfe, as the authors' code has it."""
        scale = float(self.C.diagonal().mean())
        if not scale:
            return torch.zeros_like(self.G)
        C, G = self.C / scale, self.G / scale
        D = torch.zeros_like(G, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [D], lr=1, max_iter=iterations, history_size=25, tolerance_grad=1e-12, tolerance_change=1e-15,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> float:
            with torch.no_grad():
                product = D @ C
                D.grad = 2 * (product - G)
                return float((product * D).sum() - 2 * (D * G).sum())

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return D.detach()


@dataclass(frozen=True, slots=True)
class Truncation:
    """D ≈ B·A.

    Attributes:
        A: (r, d_in). B: (d_out, r).
        error: ‖D − BA‖_F / ‖D‖_F.
    """

    A: Tensor
    B: Tensor
    error: float


def truncated(D: Tensor, rank: int) -> Truncation:
    """The best approximation of a rank, singular values shared evenly by both factors."""
    U, S, V = torch.linalg.svd(D.double(), full_matrices=False)
    kept = min(rank, len(S))
    root = S[:kept].sqrt()
    total, lost = float(S.square().sum()), float(S[kept:].square().sum())
    return Truncation(root[:, None] * V[:kept], U[:, :kept] * root, (lost / total) ** 0.5 if total else 0.0)
