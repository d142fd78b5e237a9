"""What the methods have in common that take their first factors out of the base weights, and give a plain LoRA back."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from train.methods.lora import LoraFamily
from train.methods.peft_adapter import (
    ADAPTER,
    adapter_tensors,
    put_adapter_tensors,
    write_adapter,
)
from train.options.common import LowRankOptions
from train.protocol import MethodContext

INITIAL = "initial_factors.safetensors"

Options = TypeVar("Options", bound=LowRankOptions)


class ChangedBase(LoraFamily[Options]):
    """W becomes W − s·B₀·A₀ before the first step, and s·B₀·A₀ is trained on.

    The export is ΔW = s·(B·A − B₀·A₀) = s·[B | −B₀]·[A ; A₀]: a plain LoRA of rank 2r on the untouched W.
    """

    _initial: dict[str, torch.Tensor]

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        if context.checkpoint is None:
            prepared = super().prepare(model, context)
            self._initial = adapter_tensors(prepared)
            return prepared
        # Decomposing W again could give other factors on another machine.
        self._initial = load_file(context.checkpoint / INITIAL)
        prepared = super().prepare(model, context)
        put_adapter_tensors(prepared, self._initial)
        for layer in prepared.modules():
            if isinstance(layer, LoraLayer):
                _take_out(layer)
        return prepared

    def config(self, context: MethodContext) -> LoraConfig:
        config = super().config(context)
        if context.checkpoint is not None:
            config.init_lora_weights = True
        return config

    def save(self, model: nn.Module, directory: Path) -> None:
        super().save(model, directory)
        save_file(self._initial, directory / INITIAL)

    def export(self, model: nn.Module, directory: Path) -> None:
        trained, joined = adapter_tensors(model), {}
        for name, value in trained.items():
            first = self._initial[name]
            if ".lora_A." in name:
                joined[name] = torch.cat([value, first])
            elif ".lora_B." in name:
                joined[name] = torch.cat([value, -first], dim=1)
            else:  # of a module that is trained whole
                joined[name] = value
        config: LoraConfig = model.peft_config[ADAPTER]  # type: ignore[index]
        plain = LoraConfig(
            task_type=config.task_type,
            r=2 * config.r,
            lora_alpha=2 * config.lora_alpha,
            target_modules=config.target_modules,
            modules_to_save=config.modules_to_save,
            base_model_name_or_path=config.base_model_name_or_path,
            fan_in_fan_out=config.fan_in_fan_out,
        )
        write_adapter(directory, joined, plain)


def _take_out(layer: LoraLayer) -> None:
    """W − s·B·A, as PEFT computes it."""
    weight = layer.get_base_layer().weight
    a, b = layer.lora_A[ADAPTER].weight.data, layer.lora_B[ADAPTER].weight.data
    turned = bool(getattr(layer, "fan_in_fan_out", False))
    found = weight.data.to(torch.float32)
    taken = layer.scaling[ADAPTER] * b @ a
    weight.data = (found - (taken.T if turned else taken)).to(weight.dtype)
