"""Stored adapters measured on a base model, one after another, with nothing trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from train.base_files import BaseFiles
from train.data import DataFile
from train.declared import is_declared, load_for_a_while, take_off
from train.evaluation import Scores, compare
from train.measurement_settings import MeasurementSettings
from train.metrics import HIGHER_IS_BETTER
from train.quiet import peft_deprecations_ignored
from train.tasks.catalog import make_task
from train.tasks.protocol import Task, TaskContext

Tick = Callable[[int, int], None]
"""Called with the rows that are measured already, and all of them; may raise to stop."""


class Measurement:
    """A base model with the rows that it is measured on; the model itself is measured first."""

    def __init__(
        self, base: BaseFiles, data: DataFile, settings: MeasurementSettings, device: str, folder: Path, tick: Tick
    ) -> None:
        """Load the model and the rows.

        Raises:
            FileBroken: rows that the task can not use, named.
            RequestInvalid: the model can not be loaded, or no row is left.
        """
        self._settings = settings
        context = TaskContext(base, settings.training(), device, 0, folder)
        self._task: Task[Any] = make_task(settings.full_task, context)
        self._rows = self._task.read(data, settings.evaluation()).train[: settings.max_rows]
        self._model: nn.Module = self._task.load()
        self._tick = tick
        self._base = self._scores(self._model)

    @property
    def rows(self) -> int:
        """How many are measured."""
        return len(self._rows)

    @property
    def base(self) -> dict[str, float]:
        """The figures of the model without an adapter."""
        return self._base.to_dict()

    def of(self, directory: Path) -> dict[str, Any]:
        """The figures of the model with an adapter of PEFT's or of our own types, and their difference from those
        without it.

        The adapter stands beside the weights and is taken off afterwards: the model is bit for bit what it was.
        """
        scores = self._declared_scores(directory) if is_declared(directory) else self._peft_scores(directory)
        settings = self._settings
        return {
            "figures": scores.to_dict(),
            "difference": compare(self._base, scores, settings.evaluation(), seed=0),
        }

    def _peft_scores(self, directory: Path) -> Scores:
        from peft import PeftModel

        with peft_deprecations_ignored():
            adapted = PeftModel.from_pretrained(self._model, str(directory))
        scores = self._scores(adapted)
        self._model = adapted.unload()
        if hasattr(self._model, "peft_config"):
            del self._model.peft_config
        return scores

    def _declared_scores(self, directory: Path) -> Scores:
        adapted = load_for_a_while(self._model, directory)
        scores = self._scores(adapted)
        take_off(adapted)
        return scores

    def order(self, figures: dict[str, float]) -> float:
        """What sorts candidates by the metric, the best one first."""
        value = figures[self._settings.metric]
        return -value if HIGHER_IS_BETTER[self._settings.metric] else value

    def _scores(self, model: nn.Module) -> Scores:
        total = len(self._rows)
        return self._task.score(model, self._rows, self._settings.evaluation(), lambda done: self._tick(done, total))
