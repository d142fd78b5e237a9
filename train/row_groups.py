"""Rows of parameters that join the optimiser at different steps, each with moments and a schedule of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from train.learning_rates import rate_at

if TYPE_CHECKING:
    from train.settings import TrainingSettings

START = "start"
"""Key of a group of the optimiser: the step at which it joined."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows `first` to `last` (not included) of a parameter."""

    parameter: nn.Parameter
    first: int
    last: int


class RowGroups:
    """An optimiser over rows of larger parameters.

    What the optimiser holds are parameters of their own that share memory with the rows, and with the rows of the
    gradient. So each group has the moments and step counts of a parameter that was made when it joined, while the
    model's own parameters stay the same from the beginning, which data-parallel training needs.
    """

    def __init__(self, settings: TrainingSettings, start: Sequence[Rows], whole: Sequence[tuple[str, nn.Parameter]]):
        """`start`: what is trained from step 0 on; `whole`: names and parameters that are trained as they are."""
        self._settings = settings
        self._blocks: dict[nn.Parameter, list[tuple[Rows, nn.Parameter]]] = {}
        rate, decay = settings.learning_rate, settings.weight_decay
        groups: list[dict[str, Any]] = [{"params": self._views(start), "weight_decay": decay, START: 0}]
        decayed = [parameter for name, parameter in whole if not name.endswith("bias")]
        others = [parameter for name, parameter in whole if name.endswith("bias")]
        groups += [
            {"params": params, "weight_decay": share, START: 0}
            for params, share in ((decayed, decay), (others, 0.0))
            if params
        ]
        self.optimizer: Optimizer = (
            torch.optim.SGD(groups, lr=rate) if settings.optimizer == "sgd" else torch.optim.AdamW(groups, lr=rate)
        )

    def join(self, step: int, rows: Sequence[Rows]) -> None:
        """Train these from the step after `step` on."""
        group = {"params": self._views(rows), "weight_decay": self._settings.weight_decay, START: step}
        # The schedule sets its rate after this step; until then nothing of it moves.
        self.optimizer.add_param_group(group | {"lr": 0.0, "initial_lr": self._settings.learning_rate})

    def attach(self) -> None:
        """Give the optimiser the gradients of its rows, as they are now."""
        for parameter, blocks in self._blocks.items():
            for rows, view in blocks:
                view.data = parameter.data[rows.first : rows.last]
            _share_gradient(parameter, blocks)

    def detach(self) -> None:
        """Let go of the gradients, so that they can be freed."""
        for blocks in self._blocks.values():
            for _, view in blocks:
                view.grad = None

    def _views(self, rows: Sequence[Rows]) -> list[nn.Parameter]:
        made = []
        for part in rows:
            view = nn.Parameter(part.parameter.data[part.first : part.last])
            if part.parameter not in self._blocks:
                self._blocks[part.parameter] = []
                # Loss scaling looks at the optimiser's gradients before the step's hooks.
                part.parameter.register_post_accumulate_grad_hook(self._share)  # type: ignore[no-untyped-call]
            self._blocks[part.parameter].append((part, view))
            made.append(view)
        return made

    def _share(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        _share_gradient(parameter, self._blocks[parameter])


def _share_gradient(parameter: nn.Parameter, blocks: Sequence[tuple[Rows, nn.Parameter]]) -> None:
    for rows, view in blocks:
        view.grad = None if parameter.grad is None else parameter.grad[rows.first : rows.last]


class RestartSchedule(LRScheduler):
    """Every group of the optimiser follows the same schedule from the step on at which it joined.

    With u steps since then: up along a line until u is the warm-up, then down so that all groups are at 0 at the end
    of the training (or along a cosine, or not at all).
    """

    def __init__(self, optimizer: Optimizer, settings: TrainingSettings, total_steps: int) -> None:
        self._shape, self._warmup, self._total = settings.schedule, settings.warmup_steps, total_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        return [group["initial_lr"] * self._share(group[START]) for group in self.optimizer.param_groups]

    def _share(self, start: int) -> float:
        # When a training is taken up again the schedule begins at 0 until it is told where it was.
        since = max(self.last_epoch - start, 0)
        return rate_at(self._shape, since, self._total - start, self._warmup)
