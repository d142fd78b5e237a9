"""The loop: transformers' Trainer with a method's hooks in it, complete checkpoints, and a stop at the first NaN."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from artifacts.errors import DiskFull, TrainingDiverged
from train.checkpoints import CARRIED, STATE
from train.protocol import TrainMethod
from train.settings import TrainingSettings
from train.tasks.protocol import Task

SCHEDULES: Mapping[str, str] = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
OPTIMIZERS: Mapping[str, str] = {"adamw": "adamw_torch", "sgd": "sgd"}
_NO_SPACE_BYTES = 1024 * 1024


class Observer(Protocol):
    """Who follows the loop."""

    def stop_wanted(self) -> bool:
        """Whether the loop shall end after this step, with a checkpoint."""

    def step(self, step: int, total: int, values: Mapping[str, float]) -> None:
        """An optimiser step has ended; `values` are its loss, learning rate, gradient norm and the method's own."""

    def checkpoint(self, folder: Path, step: int) -> None:
        """A complete checkpoint lies in `folder`, which is removed afterwards."""


@dataclass(slots=True)
class LoopResult:
    """What the loop did in this process: `first_step` is where it began, 0 if it was not resumed."""

    steps: int = 0
    first_step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float | None:
        """None where rows have no tokens."""
        return self.tokens / self.seconds if self.tokens and self.seconds > 0 else None


@dataclass(frozen=True, slots=True)
class LoopInputs:
    """Everything that decides the course of the loop, and where it may write.

    Attributes:
        micro_batches: split every batch into so many, with the same result but for rounding: less memory.
        carried: JSON to be found in every checkpoint.
        resume: an unpacked checkpoint.
    """

    task: Task[Any]
    examples: Sequence[Any]
    settings: TrainingSettings
    seed: int
    device: str
    folder: Path
    micro_batches: int = 1
    carried: Mapping[str, Any] = field(default_factory=dict)
    resume: Path | None = None


def run_loop(model: nn.Module, method: TrainMethod[Any], inputs: LoopInputs, observer: Observer) -> LoopResult:
    """Train `model` in place.

    Raises:
        TrainingDiverged: the loss of a step was NaN or infinite; the optimiser has not used it.
        Whatever the observer raises.
    """
    result = LoopResult()

    def batch(examples: list[Any]) -> dict[str, Tensor]:
        result.tokens += sum(map(inputs.task.tokens, examples))
        return inputs.task.collate(examples)

    follower = _Follower(method, inputs.settings, observer, result)
    trainer = _Trainer(
        model=model,
        args=_arguments(inputs),
        train_dataset=inputs.examples,
        data_collator=batch,
        compute_loss_func=inputs.task.loss(),
        callbacks=[follower],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.task, trainer.method = inputs.task, method
    trainer.settings, trainer.carried = inputs.settings, inputs.carried
    follower.trainer = trainer
    began = time.monotonic()
    trainer.train(resume_from_checkpoint=None if inputs.resume is None else str(inputs.resume))
    result.seconds = time.monotonic() - began
    result.steps = trainer.state.global_step
    return result


def total_steps(rows: int, settings: TrainingSettings) -> int:
    """Optimiser steps of the whole training."""
    if settings.steps is not None:
        return settings.steps
    batches = -(-rows // settings.batch_size)
    per_epoch = max(-(-batches // settings.gradient_accumulation), 1)
    return math.ceil((settings.epochs or 1.0) * per_epoch)


def _arguments(inputs: LoopInputs) -> TrainingArguments:
    settings = inputs.settings
    split = math.gcd(settings.batch_size, inputs.micro_batches)
    return TrainingArguments(
        output_dir=str(inputs.folder),
        per_device_train_batch_size=settings.batch_size // split,
        gradient_accumulation_steps=settings.gradient_accumulation * split,
        max_steps=total_steps(len(inputs.examples), settings),
        optim=OPTIMIZERS[settings.optimizer],
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=inputs.seed,
        data_seed=inputs.seed,
        bf16=settings.precision == "bfloat16",
        fp16=settings.precision == "float16",
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        use_cpu=not inputs.device.startswith("cuda"),
        dataloader_pin_memory=inputs.device.startswith("cuda"),
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
    )


class _Trainer(Trainer):  # type: ignore[misc]
    """Writes and reads the method's part of a checkpoint instead of transformers' own."""

    task: Task[Any]
    method: TrainMethod[Any]
    settings: TrainingSettings
    carried: Mapping[str, Any]
    pending: Tensor | None = None
    gradient_norm = 0.0
    optimizer: Any
    lr_scheduler: Any

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.pending = loss if self.pending is None else self.pending + loss
        return loss

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Any:
        found = super().compute_loss(model, self.task.step_inputs(inputs), *args, **options)
        extra = self.method.extra_loss(self.model)
        if extra is None:
            return found
        # A loss over the items of the whole step is summed over its forward passes; any other is averaged afterwards.
        counted = self.model_accepts_loss_kwargs and options.get("num_items_in_batch") is not None
        summed = counted or self.compute_loss_func is not None
        share = extra / self.current_gradient_accumulation_steps if summed else extra
        return (found[0] + share, *found[1:]) if isinstance(found, tuple) else found + share

    def take_loss(self) -> float:
        """The loss of the step, summed over its forward passes."""
        loss, self.pending = self.pending, None
        assert loss is not None
        return float(loss)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        found = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.gradient_norm = float(found) if found is not None else 0.0
        return found

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        if self.optimizer is None:
            self.optimizer = self.method.optimizer(self.model, self.settings)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            used = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = self.method.schedule(used, self.settings, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        del state_dict
        assert output_dir is not None
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.method.save(self.model, folder)
        (folder / STATE).write_text(json.dumps(self.method.state()), encoding="utf-8")
        (folder / CARRIED).write_text(json.dumps(dict(self.carried)), encoding="utf-8")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (RuntimeError, SafetensorError) as error:
            # What writes tensors tells a full disk in words of its own.
            if shutil.disk_usage(self.args.output_dir).free >= _NO_SPACE_BYTES:
                raise
            raise DiskFull(f"The disk is full at the checkpoint of step {self.state.global_step}: {error}") from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.method.load(self.model if model is None else model, folder)
        self.method.load_state(json.loads((folder / STATE).read_text(encoding="utf-8")))


class _Follower(TrainerCallback):  # type: ignore[misc]
    """Calls the method's hooks, tells the observer, and decides when a checkpoint is due."""

    trainer: _Trainer

    def __init__(
        self, method: TrainMethod[Any], settings: TrainingSettings, observer: Observer, result: LoopResult
    ) -> None:
        self._method, self._settings, self._observer, self._result = method, settings, observer, result
        self._saved_at = time.monotonic()
        self._loss = 0.0
        self._rate = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._result.first_step = state.global_step

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._method.before_step(self.trainer.model, state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._loss = self.trainer.take_loss()
        if not math.isfinite(self._loss):
            raise TrainingDiverged(
                f"The loss of step {state.global_step + 1} is {self._loss}.",
                hint="Take a lower learning rate, a warm-up or a higher precision, and look for odd rows in the data.",
            )
        self._rate = float(self.trainer.optimizer.param_groups[0]["lr"])
        self._method.before_update(self.trainer.model, state.global_step)

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._method.after_update(self.trainer.model, state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._result.losses.append(self._loss)
        values = {
            "loss": self._loss,
            "learning_rate": self._rate,
            "gradient_norm": self.trainer.gradient_norm,
            **self._method.metrics(),
        }
        self._observer.step(state.global_step, state.max_steps, values)
        stop = self._observer.stop_wanted()
        last = state.global_step >= state.max_steps
        every = self._settings.checkpoint_steps
        due = time.monotonic() - self._saved_at >= self._settings.checkpoint_seconds
        by_number = every is not None and state.global_step % every == 0
        control.should_save = stop or ((due or by_number) and not last)
        if stop:
            control.should_training_stop = True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        try:
            self._observer.checkpoint(folder, state.global_step)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._saved_at = time.monotonic()
