"""Whole transfers between tiny bases: a teacher that knows a task, and runs that stop where a test says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tiny_models import order, teach_lists, write_gemma, write_llama

from train.base_files import BaseFiles
from train.catalog import parse_parameters as training_parameters
from train.follower import Silent
from train.settings import TrainingSettings
from transfer.bench import StoredDiscriminator, TransferInputs
from transfer.catalog import find_method, parse_parameters
from transfer.distillation import Distillation, distil
from transfer.evaluation import Item
from transfer.filters.discriminator import DiscriminatorRecipe
from transfer.gate import GateSettings
from transfer.pipeline import TransferResult, transfer
from transfer.prompts import PromptFormat, discriminator_prompt
from transfer.weight_transfer import BaseWeights

FORM = PromptFormat(template="Message: {x}\nCode:")
SEEDS = tuple(order(number)[0] for number in (1, 10, 20, 31, 45))
HOLDOUT = tuple(Item(*order(number)) for number in range(46, 70))
PARAMETERS: dict[str, Any] = {
    "rows": 16,
    "max_candidates": 96,
    "input_tokens": 24,
    "generation_batch": 16,
    "answer_tokens": 8,
    "answer_batch": 6,
    "training": {"steps": 6, "learning_rate": 0.01, "batch_size": 4},
    "target_parameters": {"rank": 4},
}


class Stopped(Exception):
    """The observer ends the transfer, as the end of a process does."""


@dataclass
class Watcher:
    """Follows a transfer, and ends it before a unit or within a training.

    Attributes:
        units: how many may begin; None: all.
        train_steps: the training is asked to stop after so many looks.
    """

    units: int | None = None
    train_steps: int | None = None
    told: list[tuple[str, str]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def unit(self, stage: str, message: str) -> None:
        if self.units is not None and len(self.told) >= self.units:
            raise Stopped(stage)
        self.told.append((stage, message))

    def step(self, step: int, total: int, values: Mapping[str, float]) -> None:
        self.steps.append(step)

    def kept(self) -> None:
        pass

    def stop_wanted(self) -> bool:
        if self.train_steps is None:
            return False
        self.train_steps -= 1
        return self.train_steps == 0


def learn(
    base: Path,
    rows: list[dict[str, str]],
    folder: Path,
    steps: int,
    method: tuple[str, Mapping[str, Any]] = ("lora", MappingProxyType({"rank": 8})),
) -> Path:
    """An adapter that was trained on rows."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = TrainingSettings(steps=steps, learning_rate=0.02, batch_size=8)
    how = Distillation(method[0], training_parameters(*method), settings, 200, seed=1)
    (folder / "work").mkdir()
    distil(how, BaseFiles("acme/source", str(base)), data, folder / "work", folder / "adapter", Silent())
    return folder / "adapter"


@dataclass(frozen=True)
class Pair:
    """Two bases, a teacher of the first, and its discriminator."""

    source: Path
    target: Path
    teacher: Path
    discriminator: Path

    def inputs(self, folder: Path, **changes: Any) -> TransferInputs:
        known: dict[str, Any] = {
            "adapter": self.teacher,
            "source": BaseWeights(BaseFiles("acme/source", str(self.source)), "5" * 64),
            "target": BaseWeights(BaseFiles("acme/target", str(self.target)), "7" * 64),
            "prompt_format": FORM,
            "key": "k" * 64,
            "seed": 0,
            "folder": folder,
            "cache": folder / "cache",
            "seeds": SEEDS,
            "discriminator": StoredDiscriminator(
                self.discriminator, "d" * 64, DiscriminatorRecipe(task="orders"), auc=0.9
            ),
            "holdout": HOLDOUT,
        }
        return TransferInputs(**{**known, **changes})

    def run(
        self,
        folder: Path,
        method: str = "trans-lora",
        *,
        watcher: Watcher | None = None,
        controls: tuple[str, ...] = (),
        changes: Mapping[str, Any] | None = None,
        **parameters: Any,
    ) -> TransferResult:
        row = find_method(method)
        fields = row.options.model_fields
        known = {name: value for name, value in PARAMETERS.items() if name in fields} | parameters
        folder.mkdir(parents=True, exist_ok=True)
        return transfer(
            row,
            parse_parameters(method, known),
            self.inputs(folder, **(changes or {})),
            GateSettings(),
            watcher or Watcher(),
            controls,
        )


def make_pair(folder: Path) -> Pair:
    """Both bases in a new folder, the teacher and its discriminator."""
    folder.mkdir(parents=True, exist_ok=True)
    source = teach_lists(write_llama(folder / "source"))
    target = teach_lists(write_gemma(folder / "target"))
    orders = [order(number) for number in range(45)]
    teacher = learn(source, [dict(FORM.row(x, y)) for x, y in orders], folder / "teacher", 60)  # type: ignore[arg-type]
    asked = [(x, " yes") for x, _ in orders[::2]] + [(f"{x[5:]} {x[:4]}", " no") for x, _ in orders[1::2]]
    rows = [{"prompt": discriminator_prompt(x, "orders"), "completion": answer} for x, answer in asked]
    return Pair(source, target, teacher, learn(source, rows, folder / "discriminator", 20))


def adapter_bytes(result: TransferResult) -> dict[str, bytes]:
    """Every file of the new adapter."""
    return {path.name: path.read_bytes() for path in sorted(result.adapter.iterdir())}
