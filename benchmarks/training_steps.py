"""Steps of training methods, and of stock PEFT and transformers beside them: how long they take and how much memory."""

from __future__ import annotations

import gc
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

import train.quantised.loading  # noqa: F401 (teaches transformers packed weights)
from benchmarks.training_cases import TRANSCRIPTS, Case
from train.base_files import BaseFiles
from train.catalog import find_method, parse_parameters
from train.engine import linear_layers
from train.follower import Silent
from train.loop import LoopInputs, run_loop
from train.options.common import Circumstances, Target
from train.protocol import MethodContext, TrainMethod
from train.quiet import peft_deprecations_ignored
from train.settings import CausalLmTask, TrainingSettings
from train.targets import check_method, resolve_targets
from train.tasks.catalog import make_task
from train.tasks.causal_rows import Example, collate
from train.tasks.protocol import TaskContext
from train.world import World

SEED, RATE, WARM_UP, BATCHES, MEMORY_STEPS = 1, 1e-4, 2, 4, 3
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Setting:
    """What every line of the table has in common: the base model's folder, the batch, the rank, the threads; and the
    folders of the same base model in a few bits and of a BERT of k-mers, if a line needs them."""

    base: Path
    rank: int
    rows: int
    length: int
    steps: int
    threads: int
    packed: Path | None = None
    kmers: Path | None = None

    def training_of(self, case: Case) -> TrainingSettings:
        """The same, without clipping where the case has none."""
        return self.training if case.clips else self.training.model_copy(update={"max_grad_norm": 0.0})

    @property
    def training(self) -> TrainingSettings:
        """AdamW without decay at a constant rate: what the stock scripts do."""
        return TrainingSettings(
            steps=self.steps + WARM_UP,
            batch_size=self.rows,
            learning_rate=RATE,
            schedule="constant",
            max_grad_norm=MAX_GRAD_NORM,
        )


@dataclass(frozen=True)
class Work:
    """A frozen base model, rows for it, and which of its layers are adapted or trained whole."""

    model: Any
    rows: Sequence[Any]
    collate: Callable[[Sequence[Any]], dict[str, Tensor]]
    targets: Sequence[str]
    task_type: str
    whole: Sequence[str] = ()


def work(setting: Setting, case: Case | str) -> Work:
    """Of a case, or of a stock method of that name."""
    logging.disable_progress_bar()
    of_transcripts = case == TRANSCRIPTS or (isinstance(case, Case) and case.stock == TRANSCRIPTS)
    return _transcripts(setting) if of_transcripts else _words(setting, case)


def _words(setting: Setting, case: Case | str) -> Work:
    model = load(setting, packed=isinstance(case, Case) and case.packed)
    rows = examples(setting, model.config.vocab_size, BATCHES * setting.rows)
    targets = [target.path for target in resolve_targets(linear_layers(model), "all-linear")]
    return Work(model, rows, lambda some: collate(some, 0), targets, "CAUSAL_LM")


def _transcripts(setting: Setting) -> Work:
    """Random 3-mers of as many tokens, and classes; all layers but the classifier and the pooler get an adapter."""
    model = AutoModelForSequenceClassification.from_pretrained(setting.kmers, dtype=torch.float32)
    drawn = torch.Generator().manual_seed(SEED)
    ids = torch.randint(5, model.config.vocab_size, (BATCHES * setting.rows, setting.length), generator=drawn)
    rows = [(row, number % 2) for number, row in enumerate(ids)]

    def collated(some: Sequence[Any]) -> dict[str, Tensor]:
        given = torch.stack([row for row, _ in some])
        labels = torch.tensor([label for _, label in some])
        return {"input_ids": given, "attention_mask": torch.ones_like(given), "labels": labels}

    whole = ("classifier", "bert.pooler")
    targets = [path for path in linear_layers(model) if path.startswith("bert.encoder.")]
    return Work(model.requires_grad_(False), rows, collated, targets, "SEQ_CLS", whole)


def load(setting: Setting, *, packed: bool = False) -> Any:
    """The language model, frozen."""
    folder = setting.packed if packed else setting.base
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    model.config.use_cache = False
    return model


def examples(setting: Setting, vocabulary: int, count: int) -> list[Example]:
    """Rows of random tokens, all of which the loss counts."""
    generator = np.random.default_rng(SEED)
    rows = generator.integers(1, vocabulary, (count, setting.length), dtype=np.int32)
    return [Example(row, row, 0) for row in rows]


def stock_adapter(setting: Setting, given: Work, name: str = "LoRA") -> nn.Module:
    """PEFT's LoRA, or DoRA, of the same rank on the same layers, as any script would make it."""
    config = LoraConfig(
        task_type=given.task_type,
        r=setting.rank,
        lora_alpha=2 * setting.rank,
        target_modules=list(given.targets),
        modules_to_save=list(given.whole) or None,
        use_dora=name == "DoRA",
    )
    with peft_deprecations_ignored():
        wrapped: nn.Module = get_peft_model(given.model, config)
    return wrapped


class Steps:
    """A bare loop that takes one step at a time; with a method, its hooks are in it."""

    def __init__(self, setting: Setting, case: Case | str) -> None:
        """Load the base model and prepare it, for a case or for a stock method of that name."""
        set_seed(SEED)
        self._work = given = work(setting, case)
        rows = given.rows
        self._batches = [given.collate(rows[at : at + setting.rows]) for at in range(0, len(rows), setting.rows)]
        self._number = 0
        self._method: TrainMethod[Any] | None = None
        if isinstance(case, str):
            self._model = stock_adapter(setting, given, case)
        else:
            self._method = make_method(setting, case, given)
            self._model = self._method.prepare(given.model, self._context(setting))
        self._model.train()
        self._trained = [value for value in self._model.parameters() if value.requires_grad]
        self._optimizer, self._schedule = self._optimization(setting.training)

    def _context(self, setting: Setting) -> MethodContext:
        def batches() -> Iterator[Mapping[str, Tensor]]:
            return iter(self._batches)

        given = self._work
        return MethodContext(
            given.targets,
            setting.steps + WARM_UP,
            batches,
            setting.training,
            SEED,
            task_type=given.task_type,
            whole=given.whole,
            rows=len(given.rows),
            batch_of=lambda numbers: given.collate([given.rows[number] for number in numbers]),
            base_location=str(setting.packed or setting.base),
        )

    def _optimization(self, training: TrainingSettings) -> tuple[Any, Any]:
        own = self._method and self._method.optimizer(self._model, training)
        optimizer = own or torch.optim.AdamW(self._trained, lr=RATE, weight_decay=0.0)
        schedule = self._method and self._method.schedule(optimizer, training, training.steps or 0)
        return optimizer, schedule

    def step(self) -> float:
        """Take one; returns its seconds."""
        method, model, number = self._method, self._model, self._number
        batch = self._batches[number % len(self._batches)]
        began = time.perf_counter()
        if method is not None:
            method.before_step(model, number)
        loss = model(**batch).loss
        extra = None if method is None else method.extra_loss(model)
        (loss if extra is None else loss + extra).backward()
        nn.utils.clip_grad_norm_(self._trained, MAX_GRAD_NORM)
        if method is not None:
            method.before_update(model, number)
        self._optimizer.step()
        if self._schedule is not None:
            self._schedule.step()
        if method is not None:
            method.after_update(model, number)
            method.metrics()
        self._optimizer.zero_grad()
        self._number += 1
        return time.perf_counter() - began


def make_method(setting: Setting, case: Case, given: Work) -> TrainMethod[Any]:
    """Raises RequestInvalid if the method can not be trained on this base model."""
    options = parse_parameters(case.method, case.parameters)
    sides = linear_layers(given.model)
    targets = [Target(path, *sides[path]) for path in given.targets]
    check_method(options, Circumstances(targets, setting.training_of(case), setting.steps + WARM_UP))
    return find_method(case.method).load(options)


def step_times(setting: Setting, case: Case) -> tuple[list[float], list[float]]:
    """Seconds of the steps of the stock method and of ours, taken in turns; which one begins alternates."""
    torch.set_num_threads(setting.threads)
    stock, own = Steps(setting, case.stock), Steps(setting, case)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(WARM_UP + setting.steps):
        for place in (0, 1) if number % 2 else (1, 0):
            times[place].append((stock, own)[place].step())
    counted = slice(*(WARM_UP + int(share * setting.steps) for share in (case.measured_from, case.measured_to)))
    del stock, own
    gc.collect()
    return times[0][counted], times[1][counted]


# Memory.


def peak_memory(setting: Setting, case: Case | str) -> int:
    """Bytes at the peak of preparing and of a few steps, in a process of its own; what it had before the base model was
    loaded (the libraries) is not in it. Linux only."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure_memory, args=(setting, case, sender))
    child.start()
    sender.close()
    try:
        found: int = receiver.recv()
    except EOFError as error:
        child.join()
        raise RuntimeError(f"the process that measures memory ended with {child.exitcode}") from error
    child.join()
    return found


def _measure_memory(setting: Setting, case: Case | str, sender: Any) -> None:
    torch.set_num_threads(setting.threads)
    # Whatever is loaded on first use shall be loaded, so that it counts for no method.
    warm = nn.Linear(8, 8)
    torch.optim.AdamW(warm.parameters()).step()
    work(setting, case)
    gc.collect()
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    steps = Steps(setting, case)
    for _ in range(MEMORY_STEPS):
        steps.step()
    sender.send(_high_water() - before)


def _high_water() -> int:
    """Largest resident set since it was reset, bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024


# The loop.


def loop_times(setting: Setting, rounds: int, folder: Path) -> tuple[list[float], list[float]]:
    """Seconds of whole trainings of LoRA by a bare Trainer script and by our loop, in turns."""
    torch.set_num_threads(setting.threads)
    set_seed(SEED)
    bare, given = stock_adapter(setting, work(setting, "LoRA")), work(setting, "LoRA")
    case = Case("lora", "lora", {"rank": setting.rank, "alpha": 2.0 * setting.rank})
    method = make_method(setting, case, given)
    context = MethodContext(given.targets, setting.steps, lambda: iter(()), setting.training, SEED)
    own, rows = method.prepare(given.model, context), given.rows
    of_task = TaskContext(BaseFiles("base", str(setting.base)), setting.training, "cpu", SEED, folder)
    task = make_task(CausalLmTask(), of_task)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for place in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            if place == 0:
                _bare_training(setting, bare, rows, folder / "bare")
            else:
                inputs = LoopInputs(task, rows, setting.training, SEED, "cpu", folder / "own")
                run_loop(own, method, inputs, Silent(), World())
            times[place].append(time.perf_counter() - began)
    return times[0][1:], times[1][1:]  # the first of each warms up


def _bare_training(setting: Setting, model: nn.Module, rows: Sequence[Example], folder: Path) -> None:
    """The shortest script that trains the same with transformers alone."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=setting.rows,
        max_steps=setting.steps + WARM_UP,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM,
        seed=SEED,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=list(rows),
        data_collator=lambda batch: collate(batch, 0),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def ratio(stock: Sequence[float], own: Sequence[float]) -> float:
    """Of the medians."""
    return statistics.median(own) / statistics.median(stock)
