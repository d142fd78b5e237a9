"""Training jobs for the tests, in which one thing of the surroundings goes wrong if the job has `trouble`."""

from __future__ import annotations

import errno
import tarfile
from pathlib import Path
from typing import Any

import torch

from train.trainer import LoopTrainer
from workers.context import JobContext, JobOutcome
from workers.jobs import train

DEVICE_ROWS = 4
"""Rows that fit into the memory of the device that `little_memory` has."""
BROKEN_STEP = 21
FULL_FROM_STEP = 8


def little_memory(context: JobContext) -> JobOutcome:
    """A device that holds no more than a few rows of a batch."""
    forward = LoopTrainer.training_step

    def step(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
        rows = len(inputs["input_ids"])
        if rows > DEVICE_ROWS:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {rows} rows.")
        return forward(self, model, inputs, *args)

    if context.params.get("trouble"):
        LoopTrainer.training_step = step
    return train.run(context)


def not_a_number_once(context: JobContext) -> JobOutcome:
    """The loss of one step is NaN on the last rank, until the file named by `trouble` is there."""
    trouble, computed = context.params.get("trouble"), LoopTrainer.compute_loss

    def compute(self: Any, *args: Any, **options: Any) -> Any:
        loss = computed(self, *args, **options)
        if self.state.global_step + 1 == BROKEN_STEP and context.rank == context.world_size - 1:
            Path(str(trouble)).touch()
            return loss * float("nan")
        return loss

    if trouble and not Path(trouble).exists():
        LoopTrainer.compute_loss = compute
    return train.run(context)


def full_disk_once(context: JobContext) -> JobOutcome:
    """In the first attempt nothing more can be written from a step on."""
    add = tarfile.TarFile.add

    def write(self: Any, name: Any, *args: Any, **options: Any) -> None:
        folder = Path(name).parent.name
        if folder.startswith("checkpoint-") and int(folder.rpartition("-")[2]) >= FULL_FROM_STEP:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.name))
        add(self, name, *args, **options)

    if context.params.get("trouble") and context.spec.attempt == 1:
        tarfile.TarFile.add = write  # type: ignore[method-assign]
    return train.run(context)
