"""Drawing tokens with random numbers of a row's own, so that no other row changes what a row draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from transfer.candidates import candidate_key


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn: from softmax(logits / temperature), cut to the most likely ones.

    Attributes:
        top_k: of so many, or of all.
        top_p: of the fewest whose probabilities reach this sum; 1 cuts nothing.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None


class Draws:
    """One number in [0, 1) for each row and step; each row has a Philox generator under the key of its candidate."""

    def __init__(self, key: str, indices: Sequence[int], steps: int) -> None:
        rows = [np.random.Generator(np.random.Philox(key=candidate_key(key, index))).random(steps) for index in indices]
        self._numbers = torch.from_numpy(np.stack(rows))

    def at(self, rows: Sequence[int], step: int) -> Tensor:
        """(n,) float64."""
        return self._numbers[list(rows), step]


def draw(logits: Tensor, sampling: Sampling, numbers: Tensor) -> Tensor:
    """One token for each row by the inverse of the cumulative distribution, over the tokens in the order of their ids.

    Args:
        logits: (n, vocabulary).
        numbers: (n,) float64 in [0, 1).

    Returns:
        (n,) token ids, none of probability 0.
    """
    scaled = logits.double() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.shape[1]:
        least = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probabilities = scaled.softmax(dim=-1)
    if sampling.top_p < 1.0:
        probabilities = _nucleus(probabilities, sampling.top_p)
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1]
    wanted = torch.minimum(numbers.to(total) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, wanted[:, None], right=True)[:, 0]


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The probabilities of the fewest tokens that reach the sum, 0 for all others."""
    ordered, places = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = ordered.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, places, kept)
