"""Prompt tuning (arXiv:2104.08691), by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from artifacts.errors import FileBroken
from train.methods.peft_adapter import ADAPTER, WEIGHTS, PeftMethod
from train.options.prompt_tuning import PromptTuningOptions
from train.protocol import MethodContext

VECTORS = "prompt_embeddings"


class PromptTuning(PeftMethod[PromptTuningOptions]):
    """The trained vectors (virtual tokens, width) stand before the input's words; the base stays as it is."""

    def config(self, context: MethodContext) -> PromptTuningConfig:
        # The start is set here: PEFT would need a tokenizer's path, and would write it into the file.
        return PromptTuningConfig(
            task_type=context.task_type,
            num_virtual_tokens=self.options.virtual_tokens,
            prompt_tuning_init="RANDOM",
        )

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        words: Any = model.get_input_embeddings()  # type: ignore[operator]
        wrapped = super().prepare(model, context)
        ids = torch.tensor(self._start(context, words.num_embeddings), device=words.weight.device)
        with torch.no_grad():
            _vectors(wrapped).copy_(words(ids))
        return wrapped

    def _start(self, context: MethodContext, vocabulary: int) -> list[int]:
        """The ids of the words that the vectors start as."""
        count, text = self.options.virtual_tokens, self.options.initial_text
        ids = list(context.words(text)) if text is not None else []
        if not ids:
            drawn: list[int] = torch.randint(vocabulary, (count,)).tolist()
            return drawn
        return (ids * -(-count // len(ids)))[:count]

    def load(self, model: nn.Module, directory: Path) -> None:
        stored, place = load_file(directory / WEIGHTS), _vectors(model)
        if stored.keys() != {VECTORS} or stored[VECTORS].shape != place.shape:
            raise FileBroken("The file does not hold the vectors that are trained.")
        with torch.no_grad():
            place.copy_(stored[VECTORS])


def _vectors(model: Any) -> Tensor:
    weight: Tensor = model.prompt_encoder[ADAPTER].embedding.weight
    return weight
