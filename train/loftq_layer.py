"""The linear layer of LoftQ (arXiv:2310.08659): a LoRA beside a weight that is quantised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from train.adapted_layers import AdaptedLinear
from train.normal_float import rounded


class LoftqLinear(AdaptedLinear):
    """y = Q x + b + scaling·B·A·x, where Q is W − C·D in NormalFloat and C·D the low-rank part of the round before.

    Q follows from W and from C and D, which the adapter holds: no decomposition is needed to have it again. Until
    `quantise` the weight is still W, afterwards it is Q, in the precision of W. Q takes no less memory than W.

    Attributes:
        lora_A: (r, d_in) float32.
        lora_B: (d_out, r) float32.
        left_out_A, left_out_B: D and C, as lora_A and lora_B; with one round there is none, for it is 0.
    """

    keeps_base: ClassVar[bool] = False

    def __init__(self, base: nn.Module, rank: int, scaling: float, bits: int, iterations: int) -> None:
        super().__init__(base)
        self.scaling, self.bits, self.iterations = scaling, bits, iterations
        self._norm = super().base_norm()
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.zeros(rank, self.d_in, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.d_out, rank, device=device))
        if iterations > 1:
            self.register_buffer("left_out_A", torch.zeros(rank, self.d_in, device=device))
            self.register_buffer("left_out_B", torch.zeros(self.d_out, rank, device=device))

    @classmethod
    def declared(cls, base: nn.Module, config: Mapping[str, Any]) -> LoftqLinear:
        """The layer that the configuration of a stored adapter describes."""
        quantisation = config["quantisation"]
        scaling = float(config["lora_alpha"]) / int(config["r"])
        return cls(base, int(config["r"]), scaling, int(quantisation["bits"]), int(quantisation["iterations"]))

    def base_norm(self) -> float:
        """‖W‖_F of the weight as it came."""
        return self._norm

    def filled(self) -> None:
        self.quantise()

    @torch.no_grad()
    def decompose(self) -> None:
        """Algorithm 1: in turn Q ← round(W − B·A), and scaling·B·A ← the best rank-r part of W − Q."""
        W = self.weight.to(torch.float32)
        for round_number in range(self.iterations):
            if round_number and round_number == self.iterations - 1:
                self.get_buffer("left_out_A").copy_(self.lora_A)
                self.get_buffer("left_out_B").copy_(self.scaling * self.lora_B)
            product = (self.scaling * self.lora_B).double() @ self.lora_A.double()
            left = W - rounded((W.double() - product).to(torch.float32), self.bits)
            U, S, Vh = torch.linalg.svd(left, full_matrices=False)
            rank = self.lora_A.shape[0]
            roots = (S[:rank] / self.scaling).sqrt()
            self.lora_A.copy_(roots[:, None] * Vh[:rank])
            self.lora_B.copy_(U[:, :rank] * roots)

    @torch.no_grad()
    def quantise(self) -> None:
        """Put Q in the place of W."""
        left = self.weight.to(torch.float32)
        if self.iterations > 1:
            # In float64, so that another machine's order of sums rounds to the same levels.
            product = self.get_buffer("left_out_B").double() @ self.get_buffer("left_out_A").double()
            left = (left.double() - product).to(torch.float32)
        self.weight.copy_(rounded(left, self.bits))

    def adapter(self, x: Tensor) -> Tensor:
        return self.scaling * nn.functional.linear(nn.functional.linear(x, self.lora_A), self.lora_B)

    @torch.no_grad()
    def lost(self, weight: Tensor) -> tuple[float, float]:
        """(‖W − Q‖², ‖W − Q − scaling·B·A‖²) of the layer as it is, for the weight W that it had."""
        left = weight.to(torch.float32) - self.weight.to(torch.float32)
        return _square(left), _square(left - self.scaling * self.lora_B @ self.lora_A)


def _square(matrix: Tensor) -> float:
    return float(matrix.double().square().sum())
