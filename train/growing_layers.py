"""Linear layers whose low-rank update gains components during training, with room for all of them from the start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from train.adapted_layers import AdaptedLinear
from train.row_groups import Rows
from train.update_importance import UpdateGradient, mean_of_devices, sensitivity, tap

DEVIATION = 0.02  # standard deviation of all a and b at the start
_RANK_FLOOR = 1e-5  # added to the denominator of the scaling, as in the authors' code

Score = Literal["gradient", "lambda"]


class GrowingLinear(AdaptedLinear):
    """ΔW = c·Σ λᵢ·bᵢaᵢ with c = alpha/(r + 1e-5), over r components that count and `reserve` that are in advance.

    Components are rows of the parameters: first those that count, then those in advance, whose λ is fixed, then room
    for later ones, which is not looked at. All of it is there from the beginning, for nothing that is added later would
    be known to what averages gradients over devices.

    Attributes:
        lora_A: (room, d_in), its rows are aᵢ.
        lora_B: (room, d_out), its rows are bᵢ.
        lora_lambda: (room,).
        rank: how many count.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        largest: int,
        reserve: int,
        reserve_weight: float,
        alpha: float,
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        """`largest` is the rank that the layer can have in the end; `generator` is on the CPU."""
        super().__init__(base)
        room, device = largest + reserve, self.weight.device
        self.rank, self.largest, self.reserve, self.alpha = rank, largest, reserve, alpha
        self.dropout = nn.Dropout(dropout)

        def normal(width: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(room, width).normal_(0, DEVIATION, generator=generator).to(device))

        self.lora_A, self.lora_B = normal(self.d_in), normal(self.d_out)
        weights = torch.full((room,), reserve_weight)
        weights[:rank] = 0
        self.lora_lambda = nn.Parameter(weights.to(device))
        self.scored: Score | None = None
        self._gradient = UpdateGradient(self.d_out, self.d_in)
        self._weight_gradient: Tensor | None = None

    @property
    def live(self) -> int:
        """How many components are trained."""
        return self.rank + self.reserve

    @property
    def scaling(self) -> float:
        return self.alpha / (self.rank + _RANK_FLOOR)

    def adapter(self, x: Tensor) -> Tensor:
        # λ of a component in advance is lost in half precision.
        with torch.autocast(x.device.type, enabled=False):
            x = self.dropout(x)
            fixed = self.lora_lambda[self.rank : self.live].detach()
            weights = torch.cat([self.lora_lambda[: self.rank], fixed]) * self.scaling
            inner = x @ self.lora_A[: self.live].T
            weighted = inner * weights
            scored = self.scored if torch.is_grad_enabled() else None
            if scored == "lambda":
                weighted = tap(inner, weighted, self._add_weight_gradient)
            y = weighted @ self.lora_B[: self.live]
            return tap(x, y, self._gradient.add) if scored == "gradient" else y

    def starting(self) -> list[Rows]:
        """What is trained from the first step on."""
        return [
            Rows(self.lora_lambda, 0, self.rank),
            Rows(self.lora_A, 0, self.live),
            Rows(self.lora_B, 0, self.live),
        ]

    def grow(self, gain: int) -> list[Rows]:
        """Let the first `gain` components in advance count, and take as many new ones in advance.

        Returns:
            What joins the training: λ of the former, a and b of the latter.
        """
        before, live = self.rank, self.live
        self.rank += gain
        return [
            Rows(self.lora_lambda, before, self.rank),
            Rows(self.lora_A, live, self.live),
            Rows(self.lora_B, live, self.live),
        ]

    def rescale(self, gain: int) -> None:
        """After growing by `gain`: make the λ of what counted before larger, so that its part of ΔW stays."""
        before = self.rank - gain
        with torch.no_grad():
            self.lora_lambda[:before] *= (self.rank + _RANK_FLOOR) / (before + _RANK_FLOOR)

    def silence_reserve(self) -> None:
        """Nothing grows any more: what is in advance shall not count."""
        with torch.no_grad():
            self.lora_lambda[self.rank :] = 0

    def importance(self) -> Tensor:
        """Of the gradients of this step: Σ|ΔW ∘ ∂L/∂ΔW|, or |Σ λᵢ·∂L/∂λᵢ| in the other way of scoring; a scalar."""
        weights = self.lora_lambda.detach()[: self.live]
        if self.scored == "lambda":
            return (weights * self.weight_gradient()).sum().abs()
        left = self.lora_B.detach()[: self.live] * (weights * self.scaling)[:, None]
        return sensitivity(self._gradient, left, self.lora_A.detach()[: self.live])

    def weight_gradient(self) -> Tensor:
        """∂L/∂λ of this step, also of the components in advance, whose λ no gradient reaches: (live,)."""
        found = self._weight_gradient
        return mean_of_devices(torch.zeros_like(self.lora_lambda[: self.live]) if found is None else found.clone())

    def forget_gradients(self) -> None:
        """Before the next step."""
        self._gradient.clear()
        self._weight_gradient = None

    def orthogonality(self) -> Tensor:
        """‖A·Aᵀ − I‖ + ‖Bᵀ·B − I‖ (Frobenius, not squared) over all live components together; a scalar."""
        return distance_from_orthonormal(self.lora_A[: self.live]) + distance_from_orthonormal(self.lora_B[: self.live])

    def counted(self) -> tuple[Tensor, Tensor]:
        """(A, B) of the components that count, √|λ| in both and the sign in B, without the scaling."""
        weights = self.lora_lambda.detach()[: self.rank]
        root = weights.abs().sqrt()
        a = self.lora_A.detach()[: self.rank] * root[:, None]
        b = self.lora_B.detach()[: self.rank] * (root * weights.sign())[:, None]
        return a, b.T

    def _add_weight_gradient(self, inner: Tensor, gradient: Tensor) -> None:
        found = (inner.detach() * gradient).flatten(0, -2).sum(0) * self.scaling
        self._weight_gradient = found if self._weight_gradient is None else self._weight_gradient + found


def distance_from_orthonormal(rows: Tensor) -> Tensor:
    """‖R·Rᵀ − I‖_F of (k, d); a scalar."""
    found: Tensor = torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows), device=rows.device))
    return found


def finite_importance(layers: Mapping[str, GrowingLinear]) -> dict[str, float] | None:
    """The scores of all layers, the same on all devices; None if one is not finite, as when loss scaling overflows."""
    stacked = torch.stack([layer.importance().double().cpu() for layer in layers.values()])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Equal but for the last bits on unlike devices; the choice has to be the same.
        stacked = stacked.to(next(iter(layers.values())).weight.device)
        torch.distributed.broadcast(stacked, 0)
    values = stacked.tolist()
    return dict(zip(layers, values, strict=True)) if all(map(torch.isfinite, stacked)) else None
