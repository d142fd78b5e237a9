"""Linear layers with a LoRA whose weight belongs to the transformer layer that they lie in (arXiv:2408.10774)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.adapted_layers import AdaptedLinear


@dataclass(slots=True)
class Dial:
    """The weights of the layers as the model uses them: (N,) float32 on its device; None when all are left alone."""

    weights: Tensor | None = None


class WeightedLinear(AdaptedLinear):
    """y = W x + w·scaling·B·A·dropout(x), with the weight w of the transformer layer that it lies in.

    Attributes:
        chosen: whether the layer has an adapter at all.
        shown: other factors (A, B) that are used in the place of its own.
    """

    def __init__(self, base: nn.Module, *, rank: int, scaling: float, dropout: float, dial: Dial, number: int) -> None:
        """`scaling`: of the adapter without a weight; `number`: of the transformer layer."""
        super().__init__(base)
        self._dial, self._number = dial, number
        self.scaling = scaling
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.zeros(rank, self.d_in, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.d_out, rank, dtype=torch.float32, device=device))
        self.dropout = nn.Dropout(dropout)
        self.chosen = True
        self.shown: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def begin(self, generator: torch.Generator) -> None:
        """A new adapter, which does nothing yet: A as PEFT draws it, B = 0."""
        drawn = torch.empty(self.lora_A.shape)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        self.lora_A.copy_(drawn)
        self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if not self.chosen:
            y: Tensor = self.base(x)
            return y
        return super().forward(x)

    def adapter(self, x: Tensor) -> Tensor:
        a, b = self.shown if self.shown is not None else (self.lora_A, self.lora_B)
        weights = self._dial.weights
        # r numbers a position are scaled, not d_out: the same once, and cheaper, its gradient too.
        factor = self.scaling if weights is None else self.scaling * weights[self._number]
        return functional.linear(functional.linear(self.dropout(x), a) * factor, b)
