"""Early stopping: measured on the validation rows while training, and the best step's adapter is the result."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from train.checkpoints import load_method, save_method
from train.metrics import HIGHER_IS_BETTER
from train.protocol import TrainMethod
from train.settings import EarlyStopping
from train.world import World

BEST, MEASURED = "best", "early_stopping.json"


class BestStep:
    """Measures every so many steps and after the last one, keeps the best adapter, and says when to stop.

    Only the first rank measures and keeps; the others learn from it whether to stop.

    Args:
        measure: the figure of a model on the validation rows; leaves the generators of random numbers as they were.
        folder: for the best adapter; emptied.
    """

    def __init__(
        self,
        settings: EarlyStopping,
        method: TrainMethod[Any],
        measure: Callable[[nn.Module], float],
        folder: Path,
        world: World,
    ) -> None:
        self._settings, self._method, self._measure = settings, method, measure
        self._folder, self._world = folder, world
        self._measured: list[tuple[int, float]] = []
        self._best: tuple[int, float] | None = None
        self.stopped = False

    def after_step(self, model: nn.Module, step: int, *, last: bool) -> dict[str, float]:
        """Measure, if it is time to; returns {validation_<metric>: the figure}."""
        if step % self._settings.every_steps and not last:
            return {}
        if self._world.first:
            self._take(model, step, self._measure(model))
        step, value, self.stopped = self._world.from_first((*self._newest, self.stopped))
        return {f"validation_{self._settings.metric}": value}

    @property
    def _newest(self) -> tuple[int, float]:
        return self._measured[-1] if self._measured else (0, math.nan)

    def _take(self, model: nn.Module, step: int, value: float) -> None:
        self._measured.append((step, value))
        if self._is_better(value):
            self._best = (step, value)
            shutil.rmtree(self._folder, ignore_errors=True)
            save_method(self._method, model, self._folder)
        best_step = self._best[0] if self._best is not None else 0
        since = sum(1 for measured, _ in self._measured if measured > best_step)
        self.stopped = since >= self._settings.patience

    def _is_better(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self._best is None:
            return True
        gain = value - self._best[1]
        return (gain if HIGHER_IS_BETTER[self._settings.metric] else -gain) > self._settings.min_delta

    def save(self, checkpoint: Path) -> None:
        """Into a checkpoint."""
        state = {"measured": self._measured, "best": self._best, "stopped": self.stopped}
        (checkpoint / MEASURED).write_text(json.dumps(state), encoding="utf-8")
        if self._best is not None:
            shutil.copytree(self._folder, checkpoint / BEST)

    def load(self, checkpoint: Path) -> None:
        """Out of a checkpoint."""
        state = json.loads((checkpoint / MEASURED).read_text(encoding="utf-8"))
        self._measured = [(int(step), float(value)) for step, value in state["measured"]]
        best = state["best"]
        self._best = None if best is None else (int(best[0]), float(best[1]))
        self.stopped = bool(state["stopped"])
        if best is not None:
            shutil.copytree(checkpoint / BEST, self._folder)

    def restore(self, model: nn.Module) -> None:
        """Make the model what it was at its best step."""
        if self._best is not None and self._best[0] != self._newest[0]:
            load_method(self._method, model, self._folder)

    def report(self) -> dict[str, Any]:
        """Which step was taken and why: JSON values."""
        return {
            "metric": self._settings.metric,
            "best_step": None if self._best is None else self._best[0],
            "best": None if self._best is None else self._best[1],
            "stopped": self.stopped,
            "measured": [{"step": step, "value": value} for step, value in self._measured],
        }
