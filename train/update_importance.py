"""How much a low-rank update matters: Σ|ΔW ∘ ∂L/∂ΔW|, with neither matrix ever whole unless that takes less memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

TILE = 1 << 20
"""Most entries of ΔW, and of its gradient, at a time."""


class UpdateGradient:
    """∂L/∂ΔW = Σ gᵀx of one layer, over all forward passes of a step.

    The inputs x and output gradients g are kept as they are, which is what autograd keeps of x anyway, until both
    together are larger than the matrix: from then on their product is.
    """

    def __init__(self, d_out: int, d_in: int) -> None:
        self.shape = (d_out, d_in)
        self._pieces: list[tuple[Tensor, Tensor]] = []
        self._product: Tensor | None = None
        self._entries = 0

    @torch.no_grad()
    def add(self, x: Tensor, g: Tensor) -> None:
        """x: (…, d_in) and g: (…, d_out) of one call of the layer."""
        x, g = x.detach().reshape(-1, x.shape[-1]), g.detach().reshape(-1, g.shape[-1])
        self._pieces.append((x, g))
        self._entries += x.numel() + g.numel()
        if self._product is None and self._entries > math.prod(self.shape):
            self._product = x.new_zeros(self.shape)
        if self._product is not None:
            for inputs, gradients in self._pieces:
                self._product.addmm_(gradients.T, inputs)
            self._pieces.clear()

    def clear(self) -> None:
        self._pieces.clear()
        self._product, self._entries = None, 0

    @torch.no_grad()
    def tiles(self, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their part of the gradient): the mean over all devices that train together.

        Args:
            like: gives device and precision where nothing was added.
        """
        d_out, d_in = self.shape
        height = max(TILE // d_in, 1)
        for start in range(0, d_out, height):
            rows = slice(start, min(start + height, d_out))
            if self._product is not None:
                part = self._product[rows]
            else:
                part = like.new_zeros(rows.stop - rows.start, d_in)
                for x, g in self._pieces:
                    part.addmm_(g[:, rows].T, x)
            yield rows, mean_of_devices(part)


@torch.no_grad()
def sensitivity(gradient: UpdateGradient, left: Tensor, right: Tensor) -> Tensor:
    """Σ|ΔW ∘ ∂L/∂ΔW| with ΔW = leftᵀ·right (arXiv:2308.12043).

    Args:
        left: (k, d_out), scaling and weights of the components included.
        right: (k, d_in).
    """
    total = right.new_zeros(())
    for rows, part in gradient.tiles(right):
        total += (left[:, rows].T @ right).mul_(part).abs_().sum()
    return total


def mean_of_devices(value: Tensor) -> Tensor:
    """In place: gradients that a method takes itself have to become what the optimiser sees."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value


def tap(x: Tensor, y: Tensor, sink: Callable[[Tensor, Tensor], None]) -> Tensor:
    """y as it is; when its gradient is there, `sink` is called with x and it."""
    found: Tensor = _Tap.apply(x, y, sink)  # type: ignore[no-untyped-call]
    return found


class _Tap(torch.autograd.Function):
    """Keeps x as autograd keeps things, so that it is recomputed where activations are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, sink: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sink = sink
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        (x,) = ctx.saved_tensors
        ctx.sink(x, gradient)
        return None, gradient, None
