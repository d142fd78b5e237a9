"""Linear layers with an adapter of our own beside the frozen weight, and their exchange for a model's own layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from train.quantised.packed_linear import PackedLinear


@dataclass(frozen=True, slots=True)
class LowRank:
    """ΔW = scaling·B·A as a plain LoRA has it.

    Attributes:
        A: (r, d_in) float32.
        B: (d_out, r) float32.
        scaling: factor of the product.
    """

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])


class AdaptedLinear(nn.Module, ABC):
    """y = W x + b + adapter(x), with W and b frozen.

    The adapter's own parameters are float32, whatever the precision of W; under autocast its products are not. Buffers
    and parameters of a subclass are what a checkpoint holds.

    Attributes:
        keeps_base: the base layer stays what it was, so that the adapter can be taken off.
    """

    keeps_base: ClassVar[bool] = True

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        # transformers' Conv1D keeps W as (d_in, d_out)
        self.fan_in_fan_out = not isinstance(base, nn.Linear | PackedLinear)
        self.d_out, self.d_in = (int(size) for size in self.weight.shape)

    @property
    def weight(self) -> Tensor:
        """W, (d_out, d_in); a view."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight.T if self.fan_in_fan_out else weight

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) → (…, d_out)."""
        y: Tensor = self.base(x)
        return y + self.adapter(x.to(torch.float32)).to(y.dtype)

    @abstractmethod
    def adapter(self, x: Tensor) -> Tensor:
        """What is added to the layer's output: (…, d_in) float32 → (…, d_out)."""

    @torch.no_grad()
    def delta(self) -> Tensor:
        """ΔW, (d_out, d_in) float32: for what needs the whole matrix."""
        eye = torch.eye(self.d_in, dtype=torch.float32, device=self.weight.device)
        return self.adapter(eye).T

    def base_norm(self) -> float:
        """‖W‖_F, by which a stored adapter knows its base again."""
        return float(self.weight.detach().double().norm())

    @torch.no_grad()
    def with_delta(self, dtype: torch.dtype) -> nn.Module:
        """The base layer with ΔW in its weight. `dtype`: of the model, for a layer that makes a new weight."""
        del dtype
        self.weight.copy_((self.weight.to(torch.float32) + self.delta()).to(self.weight.dtype))
        return self.base

    def filled(self) -> None:
        """Called when a loader has put stored tensors into the layer."""

    def own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of all that is the adapter's, sorted by name."""
        own = [*self.named_parameters(), *self.named_buffers()]
        yield from sorted((name, value) for name, value in own if not name.startswith("base."))


class LowRankLinear(AdaptedLinear):
    """A plain LoRA that is trained no more."""

    A: Tensor
    B: Tensor

    def __init__(self, base: nn.Module, factors: LowRank) -> None:
        super().__init__(base)
        self.register_buffer("A", factors.A)
        self.register_buffer("B", factors.B)
        self.scaling = factors.scaling

    def adapter(self, x: Tensor) -> Tensor:
        return self.scaling * nn.functional.linear(nn.functional.linear(x, self.A), self.B)


def exchange(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put `layer` where the module at `path` is."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)
