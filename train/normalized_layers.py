"""Linear layers whose weight is a learnt norm of every row times its direction: DoRA's form, and that of a whole W."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.adapted_layers import AdaptedLinear

LEAST_NORM = 1e-12
_ROWS = 1024  # of a weight in 16 bits that are turned into float32 at a time


class NormalizedLinear(AdaptedLinear):
    """y = diag(m/n)·V·x + b with n_i = ‖V_i‖₂; V begins at W and the trained m (d_out) at its norms.

    Args:
        exact: n is differentiated too, so that ∂V_i is orthogonal to V_i; else it is a constant in every step, as in
            DoRA (arXiv:2402.09353, §4.3).
    """

    def __init__(self, base: nn.Module, *, exact: bool) -> None:
        super().__init__(base)
        self.exact = exact
        self.dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        self.squares = torch.cat([rows.square().sum(1) for rows in self.blocks()])  # ‖W_i‖²
        self.magnitude = nn.Parameter(self.squares.sqrt())

    def blocks(self) -> Iterator[Tensor]:
        """W in float32, some rows at a time where that needs a copy."""
        weight = self.weight.detach()
        step = self.d_out if weight.dtype == self.dtype else _ROWS
        yield from (weight[first : first + step].to(self.dtype) for first in range(0, self.d_out, step))

    def empty_rows(self) -> int:
        """How many rows of W are 0: they have no direction."""
        return int((self.magnitude <= LEAST_NORM).sum())

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) → (…, d_out)."""
        y = self._normalized(x)
        bias = self.base.bias
        if isinstance(bias, Tensor):
            y = y + bias.to(y.dtype)
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    def adapter(self, x: Tensor) -> Tensor:
        return self._normalized(x) - functional.linear(x, self.weight.to(x.dtype))

    @abstractmethod
    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """V·x, (…, d_out), and the squares of n, (d_out) float32."""

    def _normalized(self, x: Tensor) -> Tensor:
        product, squares = self.parts(x)
        norms = squares.clamp(min=LEAST_NORM**2).sqrt()
        return product * (self.magnitude / norms).to(product.dtype)


class LowRankNormalizedLinear(NormalizedLinear):
    """V = W + scaling·B·A, with lora_A (r×d_in) and lora_B (d_out×r); dropout on the inputs of A alone.

    V is never formed: ‖V_i‖² = ‖W_i‖² + 2·scaling·⟨(W·Aᵀ)_i, B_i⟩ + scaling²·B_i·(A·Aᵀ)·B_iᵀ.
    """

    def __init__(self, base: nn.Module, rank: int, scaling: float, dropout: float, *, exact: bool) -> None:
        super().__init__(base, exact=exact)
        self.scaling = scaling
        # Drawn on the CPU, so that every device starts at the same numbers.
        start = nn.init.kaiming_uniform_(torch.empty(rank, self.d_in, dtype=self.dtype), a=math.sqrt(5))
        self.lora_A = nn.Parameter(start.to(self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.d_out, rank, dtype=self.dtype, device=self.weight.device))
        self.dropout = nn.Dropout(dropout)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        product = functional.linear(x, self.weight)
        inner = functional.linear(self.dropout(x).to(self.dtype), self.lora_A)
        low = functional.linear(inner, self.scaling * self.lora_B)
        return product + low.to(product.dtype), self._squared_norms()

    def _squared_norms(self) -> Tensor:
        with torch.autocast(self.weight.device.type, enabled=False), torch.set_grad_enabled(self._differentiated()):
            A, B = self.lora_A, self.scaling * self.lora_B
            crossed = torch.cat([rows @ A.T for rows in self.blocks()])
            # One sum over the rank for both terms: ⟨2·(W·Aᵀ)_i + B_i·(A·Aᵀ), B_i⟩
            learnt: Tensor = torch.linalg.vecdot(2 * crossed + B @ (A @ A.T), B)
            return self.squares + learnt

    def _differentiated(self) -> bool:
        return self.exact and torch.is_grad_enabled()


class WholeNormalizedLinear(NormalizedLinear):
    """V = W + change, with a trained change (d_out×d_in) that begins at 0."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base, exact=True)
        # Apart from W, so that rounding is relative to what was learnt and leaves its rank visible.
        zeros = torch.zeros(self.d_out, self.d_in, dtype=self.dtype, device=self.weight.device)
        self.change = nn.Parameter(zeros)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        V = self.weight.to(self.dtype) + self.change
        with torch.autocast(x.device.type, enabled=False):
            squares = V.square().sum(1)
        return functional.linear(x.to(self.dtype), V), squares
