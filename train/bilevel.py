"""The gradient of a validation loss with regard to what a training depends on, through steps of that training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Loss = Callable[[Sequence[Tensor], Tensor], Tensor]
"""(the trained parameters θ, the weights w) → the loss."""


@dataclass(frozen=True, slots=True)
class HyperGradient:
    """Of the mean over the validation losses.

    Attributes:
        loss: that mean.
        weights: its gradient for w, in the shape of w.
    """

    loss: float
    weights: Tensor


def hypergradient(
    w: Tensor,
    theta: Sequence[Tensor],
    training: Sequence[Loss],
    validation: Sequence[Loss],
    rate: float = 0.0,
    *,
    scale: float = 1.0,
) -> HyperGradient:
    """d/dw of the mean of the validation losses at θ_K(w), θ_{k+1} = θ_k − rate·∇_θ training_k(θ_k, w), K steps.

    Without training losses θ is held constant: the direct gradient. The graph of the K steps is gone through once, for
    all validation losses together: d/dw L(θ_K(w), w) = ∂L/∂w + (∂θ_K/∂w)ᵀ·∂L/∂θ. Nothing is written into any `grad`.

    Args:
        theta: where the steps begin; is not changed.
        scale: what a loss is multiplied by before it is differentiated, against values that vanish in float16.
    """
    leaf = w.detach().clone().requires_grad_()
    reached = _unrolled(theta, leaf, training, rate)
    points = [value.detach().requires_grad_(bool(training)) for value in reached]
    wanted = [leaf, *points] if training else [leaf]
    sums = [torch.zeros_like(value) for value in wanted]
    total = 0.0
    for loss in validation:
        value = loss(points, leaf)
        found = torch.autograd.grad(value * scale, wanted, materialize_grads=True)
        for place, gradient in zip(sums, found, strict=True):
            place.add_(gradient, alpha=1 / (scale * len(validation)))
        total += float(value.detach())
    direct, through = sums[0], sums[1:]
    if training:
        (implicit,) = torch.autograd.grad(reached, leaf, through, materialize_grads=True)
        direct = direct + implicit
    return HyperGradient(total / len(validation), direct)


def _unrolled(theta: Sequence[Tensor], leaf: Tensor, training: Sequence[Loss], rate: float) -> list[Tensor]:
    """θ_K with the graph to `leaf`."""
    current = [value.detach().clone().requires_grad_() if training else value.detach() for value in theta]
    for loss in training:
        gradients = torch.autograd.grad(loss(current, leaf), current, create_graph=True, materialize_grads=True)
        current = [value - rate * gradient for value, gradient in zip(current, gradients, strict=True)]
    return current
