"""CLoRA's update of the latent, z ← z − η·∂L/∂z (arXiv:2403.19776), with one branch's graph in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MapsOf = Callable[[Sequence[int], Tensor], list[Tensor]]
"""The maps of some branches at a latent, with a graph where gradients are on."""
LossOf = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True, slots=True)
class Gradient:
    """L and ∂L/∂z, (1, c, h, w)."""

    loss: float
    value: Tensor


@dataclass(slots=True)
class UpdateTrace:
    """One update.

    Attributes:
        step, repeat: 0-based.
        before, after: L at the same time step before and after it.
        gradient: ‖∂L/∂z‖.
        moved: RMS(η·c²·∂L/∂z) / RMS(z).
    """

    step: int
    repeat: int
    before: float
    after: float | None
    gradient: float
    moved: float


def joint_gradient(latents: Tensor, branches: int, maps_of: MapsOf, loss_of: LossOf) -> Gradient:
    """By one graph through all branches."""
    with torch.enable_grad():
        z = latents.detach().requires_grad_(True)
        loss = loss_of(maps_of(range(branches), z))
        (value,) = torch.autograd.grad(loss, z)
    return Gradient(float(loss.detach()), value)


def cached_gradient(latents: Tensor, branches: int, maps_of: MapsOf, loss_of: LossOf) -> Gradient:
    """The same, with one branch's graph at a time: ∂L/∂A_b from maps without a graph, then A_b again with one.

    The last branch's graph is kept from the first pass, so that its maps are made once: 2·branches − 1 passes.
    """
    last = branches - 1
    with torch.no_grad():
        maps = maps_of(range(last), latents) if last else []
    with torch.enable_grad():
        z = latents.detach().requires_grad_(True)
        (kept,) = maps_of([last], z)
        leaves = [item.detach().requires_grad_(True) for item in (*maps, kept)]
        loss = loss_of(leaves)
        parts = torch.autograd.grad(loss, leaves, allow_unused=True)
        total = torch.zeros_like(latents)
        graph: Tensor | None = kept
        del kept
        for branch in (last, *range(last)):
            if parts[branch] is None:
                continue
            if graph is None:
                z = latents.detach().requires_grad_(True)
                (graph,) = maps_of([branch], z)
            (value,) = torch.autograd.grad(graph, z, grad_outputs=parts[branch])
            total += value
            graph = None
    return Gradient(float(loss.detach()), total)


def step_size(eta: float, schedule: Literal["constant", "sqrt_decay"], index: int, steps: int) -> float:
    """η of a step: constant, or η·√ of a line from 1 in the first to 0.5 in the last step (arXiv:2312.06059)."""
    if schedule == "constant":
        return eta
    share = index / (steps - 1) if steps > 1 else 0.0
    return eta * math.sqrt(1.0 - 0.5 * share)


def rms(value: Tensor) -> float:
    """The root of the mean square."""
    return float(value.double().square().mean().sqrt())
