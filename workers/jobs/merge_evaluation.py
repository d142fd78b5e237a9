"""Merged adapters measured on stored datasets, on their base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from train.base_files import BaseFiles
from train.data import DataFile
from train.measurement import Measurement, Tick
from train.measurement_settings import MeasurementSettings
from workers.context import JobContext


class MergeEvaluation:
    """What a job's `evaluation` asks for: {dataset or datasets, base_model, and the settings of a measurement}."""

    def __init__(self, context: JobContext, wanted: Mapping[str, Any], tick: Tick) -> None:
        """Load the base model and the rows, and measure the model alone.

        Raises: what is wrong with a dataset or with the base model (`train.measurement.Measurement`).
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

    @property
    def metric(self) -> Literal["loss", "perplexity", "exact_match"]:
        """What the best is chosen by."""
        return self._settings.metric

    def of(self, directory: Path) -> dict[str, Any]:
        """As `train.measurement.Measurement.of`."""
        return self._measurement.of(directory)

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
