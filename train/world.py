"""The processes that train together, one for each device: what they agree on, and how they wait for one another."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed, nn

PATIENCE = timedelta(days=30)
"""How long a rank waits for another that is alive. One that has died is noticed at once: its connection closes."""
_DRIFT = 1e-4

Value = TypeVar("Value")


class RanksDriftedError(Exception):
    """The ranks no longer hold the same parameters: a method changed them by something that is another on each rank."""


class World:
    """This process is number `rank` of `size`; without `torch.distributed` it is alone, and nothing here costs time.

    What is agreed on goes over gloo on the CPU, whatever the gradients use, in a group of its own that waits for as
    long as it takes: an evaluation by the first rank may last longer than any sensible time-out of a gradient.
    Every method is a collective one: all ranks call it, in the same order.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self.rank, self.size = 0, 1
        if distributed.is_available() and distributed.is_initialized():
            self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        if self.size > 1:
            self._group = distributed.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def first(self) -> bool:
        """Whether this rank evaluates, writes and reports."""
        return self.rank == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """Over all ranks, each of the values."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(total, group=self._group)
        return [float(value) for value in total]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.sums([float(flag)])[0] > 0

    def from_first(self, value: Value) -> Value:
        """What the first rank passed; what the others pass is ignored."""
        if self.size == 1:
            return value
        box = [value if self.first else None]
        distributed.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
        found: Any = box[0]
        return found  # type: ignore[no-any-return]

    def gathered(self, value: Value) -> list[Value]:
        """What each rank passed, in the order of the ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value, group=self._group)
        return found

    def wait(self) -> None:
        """Until all ranks are here."""
        self.from_first(None)
        self.sums([0.0])

    def check_equal(self, model: nn.Module) -> None:
        """Compare what the ranks train, up to rounding.

        Raises:
            RanksDriftedError: on every rank.
        """
        if self.size == 1:
            return
        trained = [parameter.detach().double() for parameter in model.parameters() if parameter.requires_grad]
        marks = self.gathered([(float(value.sum()), float(value.norm())) for value in trained])
        for mark in marks[1:]:
            same = len(mark) == len(marks[0])
            for (sum_, norm), (first_sum, first_norm) in zip(mark, marks[0], strict=same):
                allowed = _DRIFT * (1.0 + first_norm)
                same = same and abs(norm - first_norm) <= allowed and abs(sum_ - first_sum) <= allowed * 100
            if not same:
                raise RanksDriftedError("the ranks of this training no longer hold the same parameters")
