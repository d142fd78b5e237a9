"""SMoRA (arXiv:2501.15103): its layers, the balance of their load, and the export as a type of our own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from artifacts.errors import NotMergeable
from train import declared
from train.adapted_layers import AdaptedLinear, LowRank, LowRankLinear, exchange
from train.continuation import Start
from train.methods.own_adapter import OwnMethod, write_plain_lora
from train.options.smora import SmoraOptions
from train.protocol import Beside, Measure, MethodContext
from train.rank_usage import TaskUsage, told, usage_of
from train.smora_layer import Shape, SmoraLinear, Tally

TYPE = "RANKWISE_SMORA"
ROWS = 64
"""Training rows of each task that tell how the ranks are used."""


FOLD_KEY = "rankwise_smora_fold"
_NO_NAME = re.compile(r"[^A-Za-z0-9_.]+")


@dataclass(frozen=True, slots=True)
class Fold:
    """The plain LoRA of one task, and what it loses against SMoRA on that task's validation rows."""

    task: str
    figures: Mapping[str, float]
    own_figures: Mapping[str, float]
    factors: Mapping[str, LowRank]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "task": self.task,
            "loss_gap": self.figures["loss"] - self.own_figures["loss"],
            "figures": dict(self.figures),
            "smora_figures": dict(self.own_figures),
            "largest_rank": max(found.rank for found in self.factors.values()),
        }


class Smora(OwnMethod[SmoraOptions]):
    """Counts what the routers choose over all forward passes and ranks of a step, and moves the biases after it."""

    def __init__(self, options: SmoraOptions) -> None:
        super().__init__(options)
        self.tally = Tally()
        self.routed: dict[str, SmoraLinear] = {}
        self._load: dict[str, float] = {}
        self._usage: dict[str, TaskUsage] = {}
        self._folds: list[Fold] = []

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        self.routed = {}
        return super().prepare(model, context)

    def layer(self, path: str, base: nn.Module) -> SmoraLinear:
        options = self.options
        shape = Shape(
            options.rank, options.active_rank, options.numerator, options.rank_partition, options.bias_in_gate
        )
        self.routed[path] = SmoraLinear(base, shape, options.dropout, self.tally)
        return self.routed[path]

    @contextmanager
    def forward_pass(self, batch: Mapping[str, Any], *, idle: bool = False) -> Iterator[None]:
        """Within, the routers' choices are counted, of the tokens that are no padding."""
        self.tally.counting, self.tally.mask = not idle, batch.get("attention_mask")
        try:
            yield
        finally:
            self.tally.counting, self.tally.mask = False, None

    def after_update(self, model: nn.Module, step: int) -> None:
        del model, step
        layers = list(self.routed.values())
        counts = torch.stack([layer.counts for layer in layers])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(counts)
        for layer, found in zip(layers, counts, strict=True):
            layer.balance(found, self.options.bias_update_rate)
            layer.clear()
        self._load = load_of(counts)

    def metrics(self) -> dict[str, float]:
        return dict(self._load)

    def usage(self, model: nn.Module) -> dict[str, TaskUsage]:
        """What the routers do with the first training rows of each group, or of all of them as one."""
        context, found = self.context, {}
        groups = context.groups or ["all rows"] * context.rows
        size = context.settings.batch_size
        with torch.random.fork_rng():  # a task may draw when it makes a batch
            for name in sorted(set(groups)):
                rows = [number for number, group in enumerate(groups) if group == name][:ROWS]
                batches = (context.batch_of(rows[start : start + size]) for start in range(0, len(rows), size))
                found[name] = usage_of(model, self.routed, self.tally, batches, context.loss)
        return found

    def factors(self, path: str, layer: AdaptedLinear) -> LowRank:
        """Raises NotMergeable: there are none."""
        raise NotMergeable(f"{path} is of type {TYPE}: no LoRA does what it does.")

    def report(self, model: nn.Module) -> dict[str, Any]:
        options = self.options
        self._usage = self.usage(model)
        return told(self._usage) | {
            "export": {
                "form": "smora",
                "exact": True,
                "rank": options.rank,
                "active_rank": options.active_rank,
                "loads_with": f"{declared.LOADER} of Rankwise; PEFT does not know this type",
            },
            "bias": {
                "largest": max(float(layer.lora_bias.abs().max()) for layer in self.routed.values()),
                "update_rate": options.bias_update_rate,
            },
        }

    def evaluate(self, model: nn.Module, measure: Measure) -> dict[str, Any]:
        """What the plain LoRA of each task loses; a task without validation rows gets none."""
        self._folds = []
        if self.options.fold == "none":
            return {}
        left_out = []
        for task, usage in self._usage.items():
            own = measure(model, task)
            if not own:
                left_out.append(task)
                continue
            factors = {path: layer.folded(usage.layers[path].gates) for path, layer in self.routed.items()}
            for path, found in factors.items():
                exchange(model, path, LowRankLinear(self.routed[path].base, found))
            try:
                figures = measure(model, task)
            finally:
                for path, layer in self.routed.items():
                    exchange(model, path, layer)
            self._folds.append(Fold(task, figures, own, factors))
        return {"folds": [fold.to_dict() for fold in self._folds], "without_validation_rows": left_out}

    def export_beside(self, model: nn.Module, folder: Path) -> Sequence[Beside]:
        found = []
        for number, fold in enumerate(self._folds, 1):
            directory = folder / f"{number:02d}-{_NO_NAME.sub('-', fold.task)}"
            metadata = {FOLD_KEY: json.dumps(fold.to_dict(), sort_keys=True)}
            config = self.plain_config(fold.factors)
            write_plain_lora(directory, fold.factors, self.whole_tensors(model), config, metadata)
            words = (
                f"SMoRA folded to a plain LoRA for {fold.task}: loss {fold.figures['loss']:.4g} on its validation "
                f"rows, {fold.own_figures['loss']:.4g} before."
            )
            found.append(Beside(fold.task, directory, words))
        return found

    def export(self, model: nn.Module, directory: Path) -> None:
        options = self.options
        config = {
            "r": options.rank,
            "active_rank": options.active_rank,
            "lora_alpha": options.numerator,
            "rank_partition": options.rank_partition,
            "bias_in_gate": options.bias_in_gate,
            "bias_update_rate": options.bias_update_rate,
            "base_model_name_or_path": self.base_name,
            "task_type": self.context.task_type,
            "modules_to_save": list(self.context.whole) or None,
        }
        declared.write(directory, TYPE, self.layers, self.whole_tensors(model), config)

    def reload(self, base: nn.Module, directory: Path) -> nn.Module:
        return declared.load(base, directory)

    def _go_on(self, model: nn.Module, start: Start) -> None:
        """Factors, routers and biases are those of the stored adapter."""
        declared.fill(self._places(model), start.directory)


def load_of(counts: Tensor) -> dict[str, float]:
    """How evenly the tokens are spread, from (layers, experts): the mean over the layers of the largest load by the
    mean load (1 is even), and the share of all experts that no token chose."""
    found = counts.double()
    mean = found.mean(1).clamp(min=1e-12)
    return {
        "load_max_over_mean": float((found.max(1).values / mean).mean()),
        "unused_experts": float((counts == 0).double().mean()),
    }
