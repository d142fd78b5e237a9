"""SMoRA (arXiv:2501.15103): its layers, the balance of their load, and the export as a type of our own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from artifacts.errors import NotMergeable
from train import declared
from train.adapted_layers import AdaptedLinear, LowRank
from train.methods.own_adapter import OwnMethod
from train.options.smora import SmoraOptions
from train.protocol import MethodContext
from train.rank_usage import TaskUsage, told, usage_of
from train.smora_layer import Shape, SmoraLinear, Tally

TYPE = "RANKWISE_SMORA"
ROWS = 64
"""Training rows of each task that tell how the ranks are used."""


class Smora(OwnMethod[SmoraOptions]):
    """Counts what the routers choose over all forward passes and ranks of a step, and moves the biases after it."""

    def __init__(self, options: SmoraOptions) -> None:
        super().__init__(options)
        self.tally = Tally()
        self.routed: dict[str, SmoraLinear] = {}
        self._load: dict[str, float] = {}

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
        return told(self.usage(model)) | {
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


def load_of(counts: Tensor) -> dict[str, float]:
    """How evenly the tokens are spread, from (layers, experts): the mean over the layers of the largest load by the
    mean load (1 is even), and the share of all experts that no token chose."""
    found = counts.double()
    mean = found.mean(1).clamp(min=1e-12)
    return {
        "load_max_over_mean": float((found.max(1).values / mean).mean()),
        "unused_experts": float((counts == 0).double().mean()),
    }
