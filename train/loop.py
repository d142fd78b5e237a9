"""The loop: transformers' Trainer with a method's hooks in it, from its first step or a checkpoint to its last."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from transformers import PrinterCallback, TrainingArguments

from train.batches import Batches
from train.checkpoints import load_method
from train.early_stopping import BestStep
from train.follower import Follower, LoopResult, Observer, Position
from train.protocol import TrainMethod, Withheld
from train.settings import TrainingSettings
from train.tasks.protocol import Loss, Task
from train.trainer import IDLE, LoopTrainer
from train.world import World

__all__ = ["LoopInputs", "LoopResult", "Observer", "run_loop"]

SCHEDULES: Mapping[str, str] = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
OPTIMIZERS: Mapping[str, str] = {"adamw": "adamw_torch", "sgd": "sgd"}


@dataclass(frozen=True, slots=True)
class LoopInputs:
    """Everything that decides the course of the loop, and where it may write.

    Attributes:
        micro_batches: split every batch into so many, with the same result but for rounding: less memory. Not where
            the method frees every gradient in the backward pass.
        carried: JSON to be found in every checkpoint.
        resume: an unpacked checkpoint.
        measure: the figure of a model that `settings.early_stopping` goes by.
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
    measure: Callable[[nn.Module], float] | None = None


def run_loop(
    model: nn.Module, method: TrainMethod[Any], inputs: LoopInputs, observer: Observer, world: World
) -> LoopResult:
    """Train `model` in place; every rank calls it, with a folder of its own.

    Raises:
        TrainingDiverged: the loss of a step was NaN or infinite on some rank; the optimiser has not used it, unless
            the method updates weights in the backward pass (`frees_gradients`).
        DiskFull: a checkpoint could not be written; the one before is as it was.
        Whatever the observer raises.
    """
    if method.options.frees_gradients:  # a second pass would find the weights moved
        inputs = replace(inputs, micro_batches=1)
    result = LoopResult(devices=world.size)
    best = _best_step(method, inputs, world)
    if inputs.resume is not None and _is_over(inputs, best):
        load_method(method, model, inputs.resume)
        position = Position.of(inputs.resume)
        result.steps = result.first_step = position.step
        result.final_loss = position.loss
    else:
        with _fresh_accelerate():
            _train(model, method, inputs, observer, world, result, best)
    if best is not None and world.first and not result.stopped:
        best.restore(model)
        result.early_stopping = best.report()
    return result


def _train(
    model: nn.Module,
    method: TrainMethod[Any],
    inputs: LoopInputs,
    observer: Observer,
    world: World,
    result: LoopResult,
    best: BestStep | None,
) -> None:
    def batch(examples: list[Any]) -> dict[str, Any]:
        result.tokens += sum(map(inputs.task.tokens, examples))
        if examples:
            return inputs.task.collate(examples)
        return {**inputs.task.collate(inputs.examples[:1]), IDLE: True}

    follower = Follower(method, inputs.settings, observer, result, world, best)
    trainer = LoopTrainer(
        model=model,
        args=_arguments(inputs, world),
        train_dataset=inputs.examples,
        data_collator=batch,
        compute_loss_func=_counting(inputs.task.loss()),
        callbacks=[follower],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.task, trainer.method = inputs.task, method
    trainer.settings, trainer.carried = inputs.settings, inputs.carried
    trainer.world, trainer.batches = world, _batches(inputs, world, method.withheld())
    follower.trainer = trainer
    began = time.monotonic()
    trainer.train(resume_from_checkpoint=None if inputs.resume is None else str(inputs.resume))
    result.seconds = time.monotonic() - began
    result.steps = trainer.state.global_step
    result.tokens = int(world.sums([result.tokens])[0])


def _best_step(method: TrainMethod[Any], inputs: LoopInputs, world: World) -> BestStep | None:
    settings = inputs.settings.early_stopping
    if settings is None:
        return None
    assert inputs.measure is not None
    best = BestStep(settings, method, inputs.measure, inputs.folder / "best", world)
    if inputs.resume is not None:
        best.load(inputs.resume)
    return best


def _is_over(inputs: LoopInputs, best: BestStep | None) -> bool:
    """Whether the checkpoint is of the last step: it was asked to stop just then."""
    assert inputs.resume is not None
    if best is not None and best.stopped:
        return True
    return Position.of(inputs.resume).step >= inputs.settings.steps_for(len(inputs.examples))


@contextmanager
def _fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the number of ranks and the precision for the whole process: none of it outlives a training."""
    _forget_accelerate()
    try:
        yield
    finally:
        _forget_accelerate()


def _forget_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _counting(loss: Loss | None) -> Callable[..., Tensor] | None:
    """A task's loss under the names by which the Trainer calls it."""
    if loss is None:
        return None

    def called(outputs: Any, labels: Any, num_items_in_batch: Tensor) -> Tensor:
        return loss(outputs, labels, num_items_in_batch)

    return called


def _split(inputs: LoopInputs, world: World) -> int:
    """Into how many forward passes the rows of a batch are split on every rank."""
    return math.gcd(max(inputs.settings.batch_size // world.size, 1), inputs.micro_batches)


def _batches(inputs: LoopInputs, world: World, withheld: Withheld | None) -> Batches:
    split, rows = _split(inputs, world), len(inputs.examples)
    size = inputs.settings.batch_size // split
    given = (rows, size, inputs.seed, world.rank, world.size)
    if withheld is None:
        return Batches(*given)
    per_step = inputs.settings.gradient_accumulation * split
    epoch, step = divmod(withheld.steps, -(-rows // (size * per_step)))
    return Batches(*given, withheld=withheld.rows, until=(epoch, step * per_step))


def _arguments(inputs: LoopInputs, world: World) -> TrainingArguments:
    settings = inputs.settings
    split = _split(inputs, world)
    checkpointing = settings.gradient_checkpointing and inputs.task.checkpointing_by_trainer
    return TrainingArguments(
        output_dir=str(inputs.folder),
        per_device_train_batch_size=max(settings.batch_size // split // world.size, 1),
        gradient_accumulation_steps=settings.gradient_accumulation * split,
        max_steps=settings.steps_for(len(inputs.examples)),
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
        activation_checkpointing=checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        ddp_find_unused_parameters=True,  # which parameters a step uses is the method's business
        ddp_broadcast_buffers=False,  # methods draw alike on every rank
        use_cpu=not inputs.device.startswith("cuda"),
        dataloader_pin_memory=inputs.device.startswith("cuda"),
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
