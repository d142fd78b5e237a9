"""transformers' Trainer with a method in it: its optimiser, its loss term, its checkpoint; on one rank or several."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from train.batches import Batches
from train.checkpoints import CARRIED, disk_full_told, load_method, save_method
from train.protocol import TrainMethod
from train.settings import TrainingSettings
from train.tasks.protocol import Task
from train.tasks.rows import IGNORED
from train.world import World

IDLE = "idle"
"""Marks the batch of a rank that has no rows left: it goes through the model like the others', and counts nothing."""


class LoopTrainer(Trainer):  # type: ignore[misc]
    """Writes and reads the method's part of a checkpoint instead of transformers' own."""

    task: Task[Any]
    method: TrainMethod[Any]
    settings: TrainingSettings
    carried: Mapping[str, Any]
    world: World
    batches: Batches
    pending: Tensor | None = None
    gradient_norm = 0.0
    optimizer: Any
    lr_scheduler: Any
    _reduced: frozenset[int] | None = None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This rank's rows of every batch, in our own order: `train.batches`."""
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self._reduced is None:
            self._reduced = frozenset(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.world.size > 1 and self.accelerator.sync_gradients:
            self._average_late_gradients()
        self.pending = loss if self.pending is None else self.pending + loss
        return loss

    def _average_late_gradients(self) -> None:
        """Of what the method made trainable after the first step: DistributedDataParallel does not know of it."""
        assert self._reduced is not None
        for parameter in self.model.parameters():
            if parameter.requires_grad and id(parameter) not in self._reduced:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                distributed.all_reduce(parameter.grad)
                parameter.grad /= self.world.size

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Any:
        given = dict(inputs)
        idle = given.pop(IDLE, False)
        given = self.task.step_inputs(given, self.batches.epoch)
        with self.method.forward_pass(given, idle=idle):
            found = super().compute_loss(model, given, *args, **options)
        if idle:
            found = (found[0] * 0.0, *found[1:]) if isinstance(found, tuple) else found * 0.0
        extra = self.method.extra_loss(self.model)
        if extra is None:
            return found
        # A loss over the items of the whole step is summed over its forward passes; any other is averaged afterwards.
        counted = self.model_accepts_loss_kwargs and options.get("num_items_in_batch") is not None
        summed = counted or self.compute_loss_func is not None
        share = extra / self.current_gradient_accumulation_steps if summed else extra
        return (found[0] + share, *found[1:]) if isinstance(found, tuple) else found + share

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        counted = [
            {**batch, "labels": torch.full_like(batch["labels"], IGNORED)} if IDLE in batch else batch
            for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, device)

    def take_loss(self) -> float:
        """The loss of the step over the rows of all ranks, summed over its forward passes."""
        loss, self.pending = self.pending, None
        assert loss is not None
        return self.world.sums([float(loss)])[0] / self.world.size

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
        save_method(self.method, self.model, folder)
        (folder / CARRIED).write_text(json.dumps(dict(self.carried)), encoding="utf-8")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with disk_full_told(f"at the checkpoint of step {self.state.global_step}", Path(self.args.output_dir)):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """The generators of all ranks; only the first rank's folder is kept."""
        super()._save_rng_state(output_dir)
        if self.world.size == 1:
            return
        name = f"rng_state_{self.world.rank}.pth"
        states = self.world.gathered(Path(output_dir, name).read_bytes())
        if self.world.first:
            for rank, state in enumerate(states):
                Path(output_dir, f"rng_state_{rank}.pth").write_bytes(state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_method(self.method, self.model if model is None else model, Path(resume_from_checkpoint))
