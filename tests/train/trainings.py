"""Runs a training of the tiny base model in this process, and keeps its checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tiny_base import sums, write_rows
from transformers import AutoModelForCausalLM

from artifacts.base_model import inspect_base
from train.base_files import BaseFiles
from train.catalog import find_method, parse_parameters
from train.continuation import Start, continued_options
from train.data import DataFile
from train.engine import Inputs, Plan, train_adapter
from train.options.quantisation import QuantisationOptions
from train.packed_base import fitted
from train.quantised.engine import quantise_base
from train.report import TrainReport
from train.settings import EvaluationSettings, TrainingSettings, parse_task

PACKED = frozenset({"lq-lora"})
"""Methods that train on a quantised base model."""
TRAINING = {"steps": 20, "learning_rate": 0.01, "batch_size": 8, "gradient_accumulation": 2}


@dataclass
class Watcher:
    """Follows a training: keeps its numbers and copies its checkpoints."""

    folder: Path
    stop_at: int | None = None
    points: dict[int, dict[str, float]] = field(default_factory=dict)
    checkpoints: dict[int, Path] = field(default_factory=dict)
    told: list[tuple[float, str]] = field(default_factory=list)

    def stop_wanted(self) -> bool:
        return self.stop_at is not None and max(self.points, default=0) >= self.stop_at

    def step(self, step: int, total: int, values: Mapping[str, float]) -> None:
        self.points[step] = dict(values)

    def checkpoint(self, folder: Path, step: int) -> bool:
        self.checkpoints[step] = Path(shutil.copytree(folder, self.folder / f"kept-{step}"))
        return True

    def progress(self, fraction: float, message: str) -> None:
        self.told.append((fraction, message))


@dataclass
class Trainings:
    """Makes trainings that differ in what a test says."""

    folder: Path
    base: Path
    count: int = 0

    def __post_init__(self) -> None:
        self.data = DataFile(write_rows(self.folder / "sums.jsonl", sums()), "jsonl")
        self.base_files = BaseFiles("acme/tiny", str(self.base))

    def load_base(self) -> Any:
        """The untouched base model."""
        return self.base_files.load(AutoModelForCausalLM, "causal language model", dtype="float32", device="cpu")

    @cached_property
    def packed_files(self) -> BaseFiles:
        """The base model in a few bits, with factors of rank 4."""
        options = QuantisationOptions(rank=4, budget_bits=3, grid={"blocks": [16], "scales": [16], "scale_bits": [4]})
        quantise_base(self.base, self.folder / "packed", options, progress=lambda fraction, message: None)
        return BaseFiles("acme/tiny", str(self.folder / "packed"))

    def run(
        self,
        method: str = "lora",
        parameters: Mapping[str, Any] | None = None,
        *,
        resume: Path | None = None,
        start: Start | None = None,
        task: Mapping[str, Any] | None = None,
        evaluation: Mapping[str, Any] | None = None,
        rows: list[dict[str, Any]] | None = None,
        seed: int = 3,
        stop_at: int | None = None,
        **training: Any,
    ) -> tuple[TrainReport, Path, Watcher]:
        """One training; returns its report, the adapter's folder and who watched it."""
        self.count += 1
        folder = self.folder / f"run-{self.count}"
        folder.mkdir()
        options = parse_parameters(method, parameters or {})
        base = self.packed_files if method in PACKED else self.base_files
        options = fitted(find_method(method), options, inspect_base(Path(base.location)).quantisation)
        if start is not None:
            options = continued_options(find_method(method), options, start.manifest)
        data = self.data if rows is None else DataFile(write_rows(folder / "rows.jsonl", rows), "jsonl")
        plan = Plan(
            method=method,
            options=options,
            task=parse_task({"type": "causal-lm"} | dict(task or {})),
            training=TrainingSettings(**TRAINING | training),
            evaluation=EvaluationSettings(**{"validation_fraction": 0.2} | dict(evaluation or {})),
            seed=seed,
            device="cpu",
        )
        inputs = Inputs(base, data, folder, resume, start)
        watcher = Watcher(folder, stop_at)
        report = train_adapter(plan, find_method(method).load(options), inputs, folder / "adapter", watcher)
        return report, folder / "adapter", watcher
