"""LoRA-BERT (arXiv:2411.08073): a classifier of transcripts, trained whole or by a low-rank adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from artifacts.errors import FileBroken
from train.methods.lora import LoraFamily
from train.options.lora_bert import LoraBertOptions
from train.protocol import MethodContext, TrainMethod
from train.whole_model import WEIGHTS, write_model


def make(options: LoraBertOptions) -> TrainMethod[LoraBertOptions]:
    """The method of the mode."""
    return LoraBertWhole(options) if options.trains_base else LoraBertAdapter(options)


class LoraBertAdapter(LoraFamily[LoraBertOptions]):
    """PEFT's LoRA on the frozen base, with classifier and pooler trained whole."""


class LoraBertWhole(TrainMethod[LoraBertOptions]):
    """Every weight is trained; what is exported is a model."""

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        del context
        return model.requires_grad_(True)

    def save(self, model: nn.Module, directory: Path) -> None:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, directory / WEIGHTS)

    def load(self, model: nn.Module, directory: Path) -> None:
        try:
            model.load_state_dict(load_file(directory / WEIGHTS))
        except RuntimeError as error:
            raise FileBroken(f"The file does not hold the model that is trained: {error}") from error

    def export(self, model: nn.Module, directory: Path) -> None:
        write_model(model, directory)

    def reload(self, base: nn.Module, directory: Path) -> nn.Module:
        kind: Any = type(base)
        loaded: nn.Module = kind.from_pretrained(directory, use_safetensors=True)
        return loaded.to(next(base.parameters()).device)
