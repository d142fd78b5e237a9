"""What the methods have in common whose layers are ours: exchange, checkpoints, and the export as a plain LoRA."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from artifacts.errors import FileBroken
from train.adapted_layers import AdaptedLinear, LowRank, exchange
from train.continuation import Start
from train.methods.peft_adapter import WEIGHTS, to_file, write_adapter
from train.options.common import TrainOptions
from train.protocol import MethodContext, TrainMethod
from train.stored_factors import low_rank, whole_tensors

PREFIX = "base_model.model."

Options = TypeVar("Options", bound=TrainOptions)


class OwnMethod(TrainMethod[Options]):
    """A method that puts an `AdaptedLinear` of its own in the place of every targeted layer."""

    layers: dict[str, AdaptedLinear]
    """Path in the base model → layer, sorted by path."""

    @abstractmethod
    def layer(self, path: str, base: nn.Module) -> AdaptedLinear:
        """The layer that takes the place of `base`, its parameters on the device of W."""

    @abstractmethod
    def factors(self, path: str, layer: AdaptedLinear) -> LowRank:
        """The trained ΔW of one layer as a plain LoRA on the untouched W."""

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        model.requires_grad_(False)
        self.context = context
        self.base_name = str(getattr(model, "name_or_path", "") or "")
        self.layers = {}
        for path in sorted(context.targets):
            layer = self.layer(path, model.get_submodule(path))
            exchange(model, path, layer)
            self.layers[path] = layer
        for path in context.whole:
            model.get_submodule(path).to(torch.float32).requires_grad_(True)
        if context.start is not None and context.checkpoint is None:
            self._go_on(model, context.start)
        return model

    def begin(self, path: str, layer: AdaptedLinear, start: LowRank) -> None:
        """Let the new layer compute what a stored LoRA does; the same rank and scaling in all layers.

        For methods with "lora" in `capabilities.continues`.
        """
        raise TypeError(f"{type(self).__name__} goes on from no adapter, not at {path}")

    def save(self, model: nn.Module, directory: Path) -> None:
        save_file(self._tensors(model), directory / WEIGHTS)

    def load(self, model: nn.Module, directory: Path) -> None:
        saved, places = load_file(directory / WEIGHTS), self._places(model)
        if saved.keys() != places.keys():
            lost = sorted(saved.keys() ^ places.keys())
            raise FileBroken(f"The checkpoint does not hold the adapter that is trained: {', '.join(lost[:5])}.")
        with torch.no_grad():
            for name, place in places.items():
                place.copy_(saved[name])

    def export(self, model: nn.Module, directory: Path) -> None:
        found = {path: self.factors(path, layer) for path, layer in self.layers.items()}
        write_plain_lora(directory, found, self.whole_tensors(model), self.plain_config(found))

    def plain_config(self, found: Mapping[str, LowRank]) -> LoraConfig:
        """The configuration of a plain LoRA with these factors."""
        return plain_config(
            found,
            base_name=self.base_name,
            task_type=self.context.task_type,
            whole=self.context.whole,
            fan_in_fan_out=any(layer.fan_in_fan_out for layer in self.layers.values()),
        )

    def whole_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The modules that are trained as they are, under their paths."""
        return {
            f"{path}.{name}": value.detach()
            for path in self.context.whole
            for name, value in model.get_submodule(path).named_parameters()
        }

    def _go_on(self, model: nn.Module, start: Start) -> None:
        for path, factors in low_rank(start).items():
            self.begin(path, self.layers[path], factors)
        saved, places = whole_tensors(start), self.whole_tensors(model)
        if saved.keys() != places.keys():
            raise FileBroken(f"The adapter to go on from holds other whole modules: {', '.join(sorted(saved)[:5])}.")
        for name, place in places.items():
            place.copy_(saved[name])

    def _places(self, model: nn.Module) -> dict[str, Tensor]:
        own = {f"{path}.{name}": value for path, layer in self.layers.items() for name, value in layer.own_tensors()}
        return own | self.whole_tensors(model)

    def _tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: to_file(value) for name, value in sorted(self._places(model).items())}


def plain_config(
    found: Mapping[str, LowRank],
    *,
    base_name: str,
    task_type: str | None,
    whole: Sequence[str] = (),
    fan_in_fan_out: bool = False,
) -> LoraConfig:
    """Rank and alpha of the most frequent layer; the others get patterns with their full paths."""
    ranks = {path: factors.rank for path, factors in found.items()}
    alphas = {path: _number(factors.scaling * factors.rank) for path, factors in found.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return LoraConfig(
        task_type=task_type,
        r=rank,
        lora_alpha=alpha,
        rank_pattern={path: value for path, value in ranks.items() if value != rank},
        alpha_pattern={path: value for path, value in alphas.items() if value != alpha},
        target_modules=sorted(found),
        modules_to_save=list(whole) or None,
        base_model_name_or_path=base_name,
        fan_in_fan_out=fan_in_fan_out,
    )


def write_plain_lora(
    directory: Path,
    found: Mapping[str, LowRank],
    whole: Mapping[str, Tensor],
    config: LoraConfig,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the folder of a plain LoRA that PEFT loads; `metadata` goes into the safetensors file."""
    tensors = {f"{PREFIX}{name}": to_file(value) for name, value in whole.items()}
    for path, factors in found.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = to_file(factors.A)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = to_file(factors.B)
    write_adapter(directory, tensors, config, metadata)


def _commonest(values: Mapping[str, float]) -> float:
    counts: dict[float, int] = {}
    for value in values.values():
        counts[value] = counts.get(value, 0) + 1
    return max(sorted(counts), key=lambda value: counts[value])


def _number(value: float) -> float:
    """A whole number as one, as PEFT's configurations have it."""
    return int(value) if value == int(value) else value
