"""The order of the training rows, and which rank takes which rows of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch.utils.data import Sampler

Item = TypeVar("Item")


class Batches(Sampler[list[int]]):
    """The numbers of the rows of each batch of an epoch, shuffled by seed and epoch; of each, the share of one rank.

    Whatever the number of ranks, a batch has the same rows, also the last one of an epoch, which may be short: nothing
    is dropped and nothing is taken twice. Then a share may be empty.

    Attributes:
        epoch: which order `iter` gives.
    """

    def __init__(self, rows: int, size: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self._rows, self._size, self._seed = rows, size, seed
        self._rank, self._ranks = rank, ranks
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self._rows // self._size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed + self.epoch)
        order: list[int] = torch.randperm(self._rows, generator=generator).tolist()
        for start in range(0, self._rows, self._size):
            yield share(order[start : start + self._size], self._rank, self._ranks)


def share(items: Sequence[Item], rank: int, ranks: int) -> list[Item]:
    """The part of one rank: neighbours, in lengths that differ by at most one; all parts together are `items`."""
    first, last = (len(items) * number // ranks for number in (rank, rank + 1))
    return list(items[first:last])
