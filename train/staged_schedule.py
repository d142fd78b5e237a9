"""A schedule for a training in two stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from train.learning_rates import rate_at

if TYPE_CHECKING:
    from train.settings import TrainingSettings


class StagedSchedule(LRScheduler):
    """The shape of the learning rate once in each stage; the warm-up is the second one's."""

    def __init__(self, optimizer: Optimizer, settings: TrainingSettings, first: int, total: int) -> None:
        self._shape, self._warmup, self._first, self._total = settings.schedule, settings.warmup_steps, first, total
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        step = self.last_epoch
        if step < self._first:
            share = rate_at(self._shape, step, self._first, 0)
        else:
            share = rate_at(self._shape, step - self._first, self._total - self._first, self._warmup)
        return [group["initial_lr"] * share for group in self.optimizer.param_groups]
