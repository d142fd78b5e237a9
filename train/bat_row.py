"""The linear layer of Bone's variant bat_row (arXiv:2409.15371, "Bat-Row")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from train.adapted_layers import AdaptedLinear


class BatRowLinear(AdaptedLinear):
    """ΔW_ac = W_ac·D_c + D_c for the r×r blocks of W: a counts them along the outputs, c along the inputs.

    Neither W + ΔW nor ΔW is formed: with t_c = D_c·x_c per shard of the input, y = W·(x + t) + tile(Σ_c t_c) + b, where
    tile repeats its r numbers along the outputs. Everything but the frozen product is one block-diagonal product.

    Attributes:
        block: D, (d_in/r, r, r) float32, zeros at the start.
    """

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__(base)
        self.rank = rank
        zeros = torch.zeros(self.d_in // rank, rank, rank, dtype=torch.float32, device=self.weight.device)
        self.block = nn.Parameter(zeros)

    @classmethod
    def declared(cls, base: nn.Module, config: Mapping[str, Any]) -> BatRowLinear:
        """The layer that the configuration of a stored adapter describes.

        Raises:
            ValueError: its rank does not divide both sides of W.
        """
        rank = int(config["r"])
        sides = [int(size) for size in base.weight.shape]  # type: ignore[union-attr]
        if rank < 1 or any(size % rank for size in sides):
            raise ValueError(f"blocks of side {rank} do not fit a weight of {sides[0]}×{sides[1]}")
        return cls(base, rank)

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) → (…, d_out)."""
        moved = self.moved(x.to(torch.float32))
        y: Tensor = self.base(x + moved.to(x.dtype))
        return y + self.tiled(moved).to(y.dtype)

    def adapter(self, x: Tensor) -> Tensor:
        """ΔW·x, with a second product by W; the forward pass needs none."""
        moved = self.moved(x)
        return nn.functional.linear(moved, self.weight.to(moved.dtype)) + self.tiled(moved)

    def moved(self, x: Tensor) -> Tensor:
        """t, (…, d_in): every shard of x times its block."""
        shards = x.reshape(*x.shape[:-1], -1, self.rank)
        moved: Tensor = torch.einsum("cij,...cj->...ci", self.block, shards).flatten(-2)
        return moved

    def tiled(self, moved: Tensor) -> Tensor:
        """Σ_c t_c, repeated along the outputs: (…, d_in) → (…, d_out)."""
        total = moved.reshape(*moved.shape[:-1], -1, self.rank).sum(-2)
        return total.repeat(*[1] * (total.dim() - 1), self.d_out // self.rank)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """ΔW, (d_out, d_in) float32: for what needs the whole matrix."""
        W = self.weight.to(torch.float32)
        shards = W.reshape(self.d_out, -1, self.rank)
        guided = torch.einsum("oci,cij->ocj", shards, self.block).flatten(1)
        # D_c in every block of its column: (r, d_in), repeated along the outputs
        added = self.block.transpose(0, 1).reshape(self.rank, self.d_in)
        return guided + added.repeat(self.d_out // self.rank, 1)
