"""What happens around a step of the loop: the method's hooks, what is told, when to save, and when to stop."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from artifacts.errors import TrainingDiverged
from train.checkpoints import disk_full_told
from train.early_stopping import BestStep
from train.protocol import TrainMethod
from train.settings import TrainingSettings
from train.trainer import LoopTrainer
from train.world import World

POSITION = "position.json"
"""How far the loop was."""


class Observer(Protocol):
    """Who follows the loop, on every rank."""

    def stop_wanted(self) -> bool:
        """Whether the loop shall end after this step, with a checkpoint; on one rank is on all."""

    def step(self, step: int, total: int, values: Mapping[str, float]) -> None:
        """An optimiser step has ended; `values` are its loss, learning rate, gradient norm and the method's own."""

    def checkpoint(self, folder: Path, step: int) -> bool:
        """A complete checkpoint lies in `folder`, which is removed afterwards; whether it is kept. First rank only."""


class Silent:
    """An observer, also of a whole training (`train.engine`), that stops nothing and keeps nothing."""

    def stop_wanted(self) -> bool:
        return False

    def step(self, step: int, total: int, values: Mapping[str, float]) -> None:
        del step, total, values

    def checkpoint(self, folder: Path, step: int) -> bool:
        del folder, step
        return False

    def progress(self, fraction: float, message: str) -> None:
        del fraction, message


@dataclass(slots=True)
class LoopResult:
    """What the loop did: `first_step` is where it began in this process, 0 if it was not resumed.

    Attributes:
        tokens: of all ranks, in this process.
        final_loss: of the last step.
        stopped: the observer wanted it.
        early_stopping: see `train.early_stopping.BestStep.report`.
    """

    steps: int = 0
    first_step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    final_loss: float | None = None
    stopped: bool = False
    early_stopping: dict[str, Any] = field(default_factory=dict)
    devices: int = 1

    @property
    def tokens_per_second(self) -> float | None:
        """None where rows have no tokens."""
        return self.tokens / self.seconds if self.tokens and self.seconds > 0 else None


@dataclass(frozen=True, slots=True)
class Position:
    """Where a checkpoint was taken."""

    step: int
    loss: float | None

    @classmethod
    def of(cls, checkpoint: Path) -> Position:
        return cls(**json.loads((checkpoint / POSITION).read_text(encoding="utf-8")))

    def save(self, checkpoint: Path) -> None:
        (checkpoint / POSITION).write_text(json.dumps({"step": self.step, "loss": self.loss}), encoding="utf-8")


class Follower(TrainerCallback):  # type: ignore[misc]
    """Calls the method's hooks, tells the observer, and decides when a checkpoint is due."""

    trainer: LoopTrainer

    def __init__(
        self,
        method: TrainMethod[Any],
        settings: TrainingSettings,
        observer: Observer,
        result: LoopResult,
        world: World,
        best: BestStep | None,
    ) -> None:
        self._method, self._settings, self._observer, self._result = method, settings, observer, result
        self._world, self._best = world, best
        self._saved_at = time.monotonic()
        self._kept: int | None = None
        self._loss = 0.0
        self._rate = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._result.first_step = state.global_step
        if state.global_step:
            self._kept = state.global_step
        elif not self._world.first:
            # Other rows on every rank get other dropout masks; a checkpoint has the generators of all.
            torch.manual_seed(args.seed + self._world.rank)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        steps = -(-len(self.trainer.batches) // args.gradient_accumulation_steps)
        self.trainer.batches.epoch = state.global_step // steps

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._method.before_step(self.trainer.model, state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._loss = self.trainer.take_loss()
        self._check_finite("loss", self._loss, state.global_step + 1)
        # The scaler of float16 leaves such a step out by itself.
        if self._settings.precision != "float16":
            self._check_finite("gradient norm", self.trainer.gradient_norm, state.global_step + 1)
        self._rate = float(self.trainer.optimizer.param_groups[0]["lr"])
        self._method.before_update(self.trainer.model, state.global_step)

    def _check_finite(self, what: str, value: float, step: int) -> None:
        if math.isfinite(value):
            return
        kept = (
            "there is no checkpoint of it yet" if self._kept is None else f"its last checkpoint is of step {self._kept}"
        )
        raise TrainingDiverged(
            f"The {what} of step {step} is {value}; the training stopped before it was used, and {kept}.",
            hint="Take a lower learning rate, a warm-up or a higher precision, and look for odd rows in the data. "
            "A retry of the job goes on from the last checkpoint.",
        )

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._method.after_update(self.trainer.model, state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step, last = state.global_step, state.global_step >= state.max_steps
        self._result.final_loss = self._loss
        values = {
            "loss": self._loss,
            "learning_rate": self._rate,
            "gradient_norm": self.trainer.gradient_norm,
            **self._method.metrics(),
        }
        if self._best is not None:
            values |= self._best.after_step(self.trainer.model, step, last=last)
        self._observer.step(step, state.max_steps, values)
        every = self._settings.checkpoint_steps
        due = time.monotonic() - self._saved_at >= self._settings.checkpoint_seconds
        by_number = every is not None and step % every == 0
        # The clock is the first rank's; a wish to stop may reach any of them first.
        stops, dues = self._world.sums([self._observer.stop_wanted(), self._world.first and due])
        self._result.stopped = stops > 0
        control.should_save = self._result.stopped or ((dues > 0 or by_number) and not last)
        if self._result.stopped or (self._best is not None and self._best.stopped):
            control.should_training_stop = True
        if control.should_save or control.should_training_stop or last:
            self._world.check_equal(self.trainer.model)
        if control.should_save:
            self._check_parameters(step)

    def _check_parameters(self, step: int) -> None:
        """An update may have spoilt what is trained though its gradient was finite: such a checkpoint helps nobody."""
        for parameter in self.trainer.model.parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter.detach()).all()):
                self._check_finite("trained parameters' sum", math.nan, step)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        try:
            if self._world.first:
                self._keep(folder, state.global_step)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._world.wait()
        self._saved_at = time.monotonic()

    def _keep(self, folder: Path, step: int) -> None:
        with disk_full_told(f"at the checkpoint of step {step}", folder):
            Position(step, self._result.final_loss).save(folder)
            if self._best is not None:
                self._best.save(folder)
            if self._observer.checkpoint(folder, step):
                self._kept = step
