"""The server's arithmetic: the average of what the clients of a round gave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

Tensors = Mapping[str, Tensor]


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
