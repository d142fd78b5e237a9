"""Stored adapters measured on a base model, one after another, with nothing trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from train.base_files import BaseFiles
from train.data import DataFile
from train.declared import is_declared, load_for_a_while, take_off
from train.evaluation import Scores, compare, compare_means
from train.measurement_settings import MeasurementSettings
from train.metrics import HIGHER_IS_BETTER
from train.quiet import peft_deprecations_ignored
from train.tasks.catalog import make_task
from train.tasks.protocol import Task, TaskContext

Tick = Callable[[int, int], None]
"""Called with the rows that are measured already, and all of them; may raise to stop."""


class Measurement:
    """A base model with the rows that it is measured on, of one dataset or several; the model itself is measured first.

    Figures of several datasets are the means over them: each counts alike, whatever its size.
    """

    def __init__(
        self,
        base: BaseFiles,
        data: Sequence[DataFile],
        settings: MeasurementSettings,
        device: str,
        folder: Path,
        tick: Tick,
    ) -> None:
        """Load the model and the rows.

        Raises:
            FileBroken: rows that the task can not use, named.
            RequestInvalid: the model can not be loaded, or no row is left.
        """
        self._settings = settings
        context = TaskContext(base, settings.training(), device, 0, folder)
        self._task: Task[Any] = make_task(settings.full_task, context)
        self._rows = [self._task.read(item, settings.evaluation()).train[: settings.max_rows] for item in data]
        self._model: nn.Module = self._task.load()
        self._tick = tick
        self._base = self._scores(self._model)

    @property
    def rows(self) -> list[int]:
        """How many of each dataset are measured."""
        return [len(rows) for rows in self._rows]

    @property
    def base(self) -> dict[str, Any]:
        """The figures of the model without an adapter."""
        return _mean(self._base)

    @property
    def base_by_dataset(self) -> list[dict[str, float]]:
        """The same, for every dataset."""
        return [scores.to_dict() for scores in self._base]

    def of(self, directory: Path) -> dict[str, Any]:
        """The figures of the model with an adapter of PEFT's or of our own types, and their difference from those
        without it; of several datasets also for each.

        The adapter stands beside the weights and is taken off afterwards: the model is bit for bit what it was.
        """
        scores = self._declared_scores(directory) if is_declared(directory) else self._peft_scores(directory)
        settings = self._settings.evaluation()
        pairs = list(zip(self._base, scores, strict=True))
        found: dict[str, Any] = {"figures": _mean(scores), "difference": compare_means(pairs, settings, seed=0)}
        if len(pairs) > 1:
            found["datasets"] = [
                {"figures": after.to_dict(), "difference": compare(before, after, settings, seed=0)}
                for before, after in pairs
            ]
        return found

    def _peft_scores(self, directory: Path) -> list[Scores]:
        from peft import PeftModel

        with peft_deprecations_ignored():
            adapted = PeftModel.from_pretrained(self._model, str(directory))
        scores = self._scores(adapted)
        self._model = adapted.unload()
        if hasattr(self._model, "peft_config"):
            del self._model.peft_config
        return scores

    def _declared_scores(self, directory: Path) -> list[Scores]:
        adapted = load_for_a_while(self._model, directory)
        scores = self._scores(adapted)
        take_off(adapted)
        return scores

    def order(self, figures: dict[str, float]) -> float:
        """What sorts candidates by the metric, the best one first."""
        value = figures[self._settings.metric]
        return -value if HIGHER_IS_BETTER[self._settings.metric] else value

    def _scores(self, model: nn.Module) -> list[Scores]:
        """Of every dataset."""
        found: list[Scores] = []
        begun, total = 0, sum(self.rows)
        for rows in self._rows:
            tell = partial(self._told, begun, total)
            found.append(self._task.score(model, rows, self._settings.evaluation(), tell))
            begun += len(rows)
        return found

    def _told(self, begun: int, total: int, done: int) -> None:
        self._tick(begun + done, total)


def _mean(scores: Sequence[Scores]) -> dict[str, float]:
    """Every figure, averaged over the datasets."""
    parts = [part.to_dict() for part in scores]
    return {name: math.fsum(part[name] for part in parts) / len(parts) for name in parts[0]}
