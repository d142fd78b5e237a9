"""Merged adapters measured on stored datasets, on their base model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from artifacts.errors import RequestInvalid
from merge.plan import NAMED_OFFENDERS
from train.base_files import BaseFiles
from train.data import DataFile
from train.measurement import Measurement, Tick
from train.measurement_settings import MeasurementSettings
from workers.context import JobContext


class MergeEvaluation:
    """What a job's `evaluation` asks for: {dataset or datasets, base_model, and the settings of a measurement}."""

    def __init__(self, context: JobContext, wanted: Mapping[str, Any], tick: Tick) -> None:
        """Load the base model and the rows, and measure the model alone.

        Raises:
            RequestInvalid: the base model's own figures are NaN or infinite; or what is wrong with a dataset or with
                the base model (`train.measurement.Measurement`).
        """
        self._settings = MeasurementSettings.model_validate(
            {name: value for name, value in wanted.items() if name not in ("dataset", "datasets", "base_model")}
        )
        named = [wanted["dataset"]] if wanted.get("dataset") else wanted["datasets"]
        self._datasets = [context.dataset(dataset_id) for dataset_id in named]
        self._model, source = context.model_source(wanted["base_model"])
        self._measurement = Measurement(
            BaseFiles(self._model.name, source.location, source.revision),
            [DataFile(path, dataset.format) for dataset, path in self._datasets],
            self._settings,
            context.device,
            context.scratch / "measured",
            tick,
        )
        _check_finite("the base model alone", {"figures": self._measurement.base})

    @property
    def metric(self) -> Literal["loss", "perplexity", "exact_match"]:
        """What the best is chosen by."""
        return self._settings.metric

    def of(self, directory: Path) -> dict[str, Any]:
        """As `train.measurement.Measurement.of`. Raises RequestInvalid: a figure is NaN or infinite."""
        found = self._measurement.of(directory)
        _check_finite("the merged adapter", found)
        return found

    def order(self, figures: dict[str, float]) -> float:
        """What sorts by the metric, the best one first."""
        return self._measurement.order(figures)

    def report(self) -> dict[str, Any]:
        """What was measured on, and the base model's own figures."""
        measured = self._measurement
        datasets = [
            {"id": dataset.id, "name": dataset.name, "rows": rows, "base": base}
            for (dataset, _), rows, base in zip(self._datasets, measured.rows, measured.base_by_dataset, strict=True)
        ]
        return {
            "dataset": datasets[0]["id"] if len(datasets) == 1 else None,
            "datasets": datasets,
            "base_model": {
                "id": self._model.id,
                "name": self._model.name,
                "weights_digest": self._model.ref.weights_digest,
            },
            "settings": self._settings.model_dump(mode="json"),
            "rows": sum(measured.rows),
            "base": measured.base,
        }


def _check_finite(whose: str, found: Mapping[str, Any]) -> None:
    wrong = [f"{name} is {value}" for name, value in _numbers(found, "") if not math.isfinite(value)]
    if wrong:
        raise RequestInvalid(
            f"Measuring {whose} gave numbers that are not finite: {', '.join(wrong[:NAMED_OFFENDERS])}.",
            hint="Smaller weights may help, or output_dtype float32.",
        )


def _numbers(found: Any, name: str) -> Iterator[tuple[str, float]]:
    """Every number with the names that lead to it."""
    if isinstance(found, int | float):
        yield name, found
    elif isinstance(found, Mapping):
        for key, value in found.items():
            yield from _numbers(value, f"{name}.{key}".removeprefix("."))
    elif isinstance(found, Sequence) and not isinstance(found, str):
        for position, value in enumerate(found):
            yield from _numbers(value, f"{name}.{position}".removeprefix("."))
