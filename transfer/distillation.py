"""Stage train: a new adapter for the target base learns the synthetic set, as any dataset is learnt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from train.base_files import BaseFiles
from train.catalog import find_method
from train.continuation import Start
from train.data import DataFile
from train.engine import Inputs, Plan, TrainObserver, linear_layers, train_adapter
from train.options.common import TrainOptions
from train.report import TrainReport
from train.settings import CausalLmTask, EvaluationSettings, TrainingSettings
from train.tasks.catalog import make_task
from transfer.selected_tokens import SelectedTokens


@dataclass(frozen=True, slots=True)
class Distillation:
    """How the target adapter is trained.

    Attributes:
        method, options: of the menu of training.
        token_share: share of the tokens of a batch that are learnt, by their scores; None: all.
    """

    method: str
    options: TrainOptions
    training: TrainingSettings
    max_length: int
    seed: int
    device: str = "cpu"
    token_share: float | None = None
    micro_batches: int = 1

    def plan(self) -> Plan:
        """On every row; what a transfer measures, it measures elsewhere."""
        return Plan(
            method=self.method,
            options=self.options,
            task=CausalLmTask(max_length=self.max_length, overlong="drop"),
            training=self.training,
            evaluation=EvaluationSettings(validation_fraction=0.0),
            seed=self.seed,
            device=self.device,
            micro_batches=self.micro_batches,
        )


def distil(
    how: Distillation,
    base: BaseFiles,
    rows: Path,
    folder: Path,
    output: Path,
    observer: TrainObserver,
    resume: Path | None = None,
    start: Start | None = None,
) -> TrainReport:
    """Train on the rows (JSON Lines of `transfer.synthetic.SyntheticSet.training_rows`) and write the adapter.

    Args:
        folder: the training's own.
        resume: an unpacked checkpoint of the same training.
        start: the adapter that the training goes on from; the options follow it.

    Raises:
        As `train.engine.train_adapter`.
    """
    make = make_task if how.token_share is None else partial(SelectedTokens, share=how.token_share)
    method = find_method(how.method).load(how.options)
    return train_adapter(
        how.plan(), method, Inputs(base, DataFile(rows, "jsonl"), folder, resume, start), output, observer, make
    )


def layers_of(base: BaseFiles) -> Mapping[str, tuple[int, int]]:
    """Path → (d_out, d_in) of the base model's linear layers; no weight is read."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base.config(), trust_remote_code=False)
    return linear_layers(model)
