"""Methods that are a weighted sum of the deltas, with weights computed from the angles between them.

All of them need the N×N inner products ⟨ΔWᵢ, ΔWⱼ⟩ alone, which are block sums of G_A∘G_B; the result is then
concatenated, or truncated to a rank, as any weighted sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from merge.methods import linear
from merge.options import RankedOptions
from merge.peer_options import KarcherOptions, ModelStockOptions, SlerpOptions
from merge.result import MergedModule
from merge.stack import Stack

NEARLY_PARALLEL = 0.9995
"""Beyond this |cosine| the great circle is a straight line to rounding, or not unique: mergekit's bound."""


def slerp(stack: Stack, options: SlerpOptions, rank: int) -> MergedModule:
    """Spherical interpolation: sin((1−t)θ)/sinθ·ΔW₁ + sin(tθ)/sinθ·ΔW₂, θ the angle between the two deltas.

    ΔW₁ is the first adapter of the request. A module that only one of them has stays as it is.
    """
    owners = [owner for owner, _ in stack.members]
    if len(owners) == 1:
        return _summed(stack, torch.ones(1, dtype=torch.float64), options, rank, {})
    first = owners.index(min(owners))
    weights = stack.owner_weights
    t = options.t if options.t is not None else float(weights[1 - first] / weights.sum())
    cosine = _cosine(stack.products, 0, 1)
    if abs(cosine) > NEARLY_PARALLEL:
        of_first, of_second = 1 - t, t
    else:
        theta = math.acos(cosine)
        of_first, of_second = math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
    coefficients = torch.empty(2, dtype=torch.float64)
    coefficients[first], coefficients[1 - first] = of_first, of_second
    return _summed(stack, coefficients, options, rank, {"cosine": cosine})


def karcher(stack: Stack, options: KarcherOptions, rank: int) -> MergedModule:
    """Karcher mean: the direction whose summed squared angle to all deltas is least, at their weighted mean norm.

    The mean of unit deltas uᵢ stays in their span, so the fixed-point iteration of the Riemannian gradient runs on its
    N coordinates and the N×N cosines alone.
    """
    norms = stack.products.diagonal().sqrt()
    weights = stack.owner_weights / stack.owner_weights.sum()
    there = norms > 0
    if not bool(there.any()):
        return _summed(stack, torch.zeros_like(norms), options, rank, {})
    inverse = torch.where(there, 1 / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)
    cosines = stack.products * inverse[:, None] * inverse
    shares = torch.where(there, weights, 0.0)
    shares = shares / shares.sum()
    mean, steps = _spherical_mean(cosines, shares, options)
    radius = float((weights * norms).sum())
    return _summed(stack, radius * mean * inverse, options, rank, {"iterations": float(steps)})


def model_stock(stack: Stack, options: ModelStockOptions, rank: int) -> MergedModule:
    """Model Stock (arXiv:2403.19522, eq. of the interpolation ratio): t·mean ΔWᵢ, t = N·c/(1 + (N−1)·c).

    c is the mean pairwise cosine. t is kept within [0, 1]: deltas that point apart have no centre to move to.
    """
    count = len(stack.members)
    signs = stack.owner_weights.sign()
    pairs = [
        float(signs[i] * signs[j]) * _cosine(stack.products, i, j) for i in range(count) for j in range(i + 1, count)
    ]
    cosine = max(math.fsum(pairs) / len(pairs), 0.0) if pairs else 1.0
    t = count * cosine / (1 + (count - 1) * cosine)
    return _summed(stack, stack.owner_weights * t / count, options, rank, {"cosine": cosine, "t": t})


def _spherical_mean(cosines: Tensor, shares: Tensor, options: KarcherOptions) -> tuple[Tensor, int]:
    """Coordinates of the mean in the unit deltas, and how many steps it took."""
    mean = _unit(shares, cosines)
    if mean is None:
        # weighted units that cancel have no mean direction to start from
        mean = torch.zeros_like(shares)
        mean[int(shares.argmax())] = 1.0
    for step in range(options.max_iter):
        dots = (cosines @ mean).clamp(-1.0, 1.0)
        angles = torch.acos(dots)
        sines = angles.sin()
        pull = shares * torch.where(sines > options.tol, angles / sines.clamp_min(options.tol), 1.0)
        tangent = pull - float((pull * dots).sum()) * mean
        length = float((tangent @ cosines @ tangent).clamp_min(0).sqrt())
        if length < options.tol:
            return mean, step
        moved = _unit(math.cos(length) * mean + math.sin(length) / length * tangent, cosines)
        if moved is None:
            break
        mean = moved
    return mean, options.max_iter


def _unit(coordinates: Tensor, cosines: Tensor) -> Tensor | None:
    length = float((coordinates @ cosines @ coordinates).clamp_min(0).sqrt())
    return coordinates / length if length > 1e-9 else None


def _cosine(products: Tensor, i: int, j: int) -> float:
    norm = float((products[i, i] * products[j, j]).sqrt())
    return max(-1.0, min(1.0, float(products[i, j]) / norm)) if norm > 0 else 0.0


def _summed(
    stack: Stack, coefficients: Tensor, options: RankedOptions, rank: int, figures: Mapping[str, float]
) -> MergedModule:
    """Σ cᵢ·ΔWᵢ, with cᵢ in the order of `Stack.members`."""
    weights = torch.empty_like(stack.weights)
    for (_, own), coefficient in zip(stack.members, coefficients, strict=True):
        weights[own] = float(coefficient)
    merged = linear.merge(stack.with_weights(weights), options, rank)
    return replace(merged, stack=stack, figures=figures)
