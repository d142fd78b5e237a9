"""The server's arithmetic: whether what a client gave can be used, and the average of what all gave."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from artifacts.errors import FileBroken

Tensors = Mapping[str, Tensor]


def check_update(update: Tensors, start: Tensors, max_norm: float | None = None) -> float:
    """How far a client's tensors are from the round's start: Frobenius norm over all of them.

    Args:
        start: the trained tensors that the client was given.

    Raises:
        FileBroken: other names, shapes or types, a number that is not finite, or farther away than `max_norm`.
    """
    if odd := sorted(update.keys() ^ start.keys()):
        raise FileBroken(f"{odd[0]!r} is {'not asked for' if odd[0] in update else 'missing'}.")
    square = 0.0
    for name, before in start.items():
        given = update[name]
        if given.shape != before.shape or given.dtype != before.dtype:
            raise FileBroken(
                f"{name} is {given.dtype} of the shape {tuple(given.shape)}, not {before.dtype} of "
                f"{tuple(before.shape)}."
            )
        if not bool(torch.isfinite(given).all()):
            raise FileBroken(f"{name} has numbers that are not finite.")
        square += float((given.double() - before.double()).square().sum())
    norm = math.sqrt(square)
    if max_norm is not None and norm > max_norm:
        raise FileBroken(f"It moved by {norm:.6g}, farther than max_update_norm, {max_norm:g}.")
    return norm


def shares(rows: Mapping[int, int], weighting: Literal["rows", "equal"]) -> dict[int, float]:
    """p_k of the clients that answered (client → its number of rows); they sum to 1."""
    weights = {client: count if weighting == "rows" else 1 for client, count in sorted(rows.items())}
    total = sum(weights.values())
    return {client: weight / total for client, weight in weights.items()}


def average(updates: Mapping[int, Tensors], weights: Mapping[int, float]) -> dict[str, Tensor]:
    """Σ p_k B_k (arXiv:2403.12313, section 3), summed in double precision in the order of the clients."""
    first = updates[min(updates)]
    return {
        name: sum(weights[client] * updates[client][name].double() for client in sorted(updates)).to(value.dtype)  # type: ignore[union-attr]
        for name, value in first.items()
    }
