"""The linear layer of LQ-LoRA (arXiv:2311.12023): a LoRA that begins at L1·L2, beside packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from train.adapted_layers import AdaptedLinear
from train.quantised.packed_linear import PackedLinear


class LqLinear(AdaptedLinear):
    """y = Q x + b + scaling·B·A·x, where scaling·B·A begins at L1·L2.

    Attributes:
        lora_A: (r, d_in) float32.
        lora_B: (d_out, r) float32.
        start_A, start_B: lora_A and lora_B before the first step: what was trained is the difference.
    """

    def __init__(self, base: PackedLinear, rank: int, scaling: float) -> None:
        super().__init__(base)
        self.scaling = scaling
        device = base.codes.device
        self.lora_A = nn.Parameter(torch.zeros(rank, self.d_in, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.d_out, rank, device=device))
        self.register_buffer("start_A", torch.zeros(rank, self.d_in, device=device))
        self.register_buffer("start_B", torch.zeros(self.d_out, rank, device=device))

    @classmethod
    def declared(cls, base: nn.Module, config: Mapping[str, Any]) -> LqLinear:
        """The layer that the configuration of a stored adapter describes.

        Raises:
            ValueError: the base is not the quantised layer that the adapter was trained on.
        """
        if not isinstance(base, PackedLinear):
            raise ValueError("the adapter belongs to the quantised base model, and this layer is not quantised")
        if base.identity() != config["packed_weights"].get(base.stored_path):
            raise ValueError("its packed weight is not the one that the adapter was trained on")
        return cls(base, int(config["r"]), float(config["lora_alpha"]) / int(config["r"]))

    @property
    def packed(self) -> PackedLinear:
        """The layer with the packed weight."""
        assert isinstance(self.base, PackedLinear)
        return self.base

    @torch.no_grad()
    def begin(self, left: Tensor, right: Tensor) -> None:
        """Let scaling·B·A be L1·L2, (d_out, r) and (r, d_in)."""
        root = self.scaling**0.5
        for name, value in (("A", right / root), ("B", left / root)):
            self.get_parameter(f"lora_{name}").copy_(value)
            self.get_buffer(f"start_{name}").copy_(value)

    def adapter(self, x: Tensor) -> Tensor:
        return self.scaling * nn.functional.linear(nn.functional.linear(x, self.lora_A), self.lora_B)

    @torch.no_grad()
    def with_delta(self, dtype: torch.dtype) -> nn.Module:
        dense = self.packed.dense()
        dense.weight += self.delta()
        return dense.to(dtype)
