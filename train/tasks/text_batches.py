"""What the tasks of text share when they make batches and run a model of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from train.settings import TrainingSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase


def padding_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills short rows; it is masked, so that any one does."""
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    return 0


def ready_transformer(model: Any, training: TrainingSettings) -> None:
    """A model of transformers is going to be trained."""
    if training.gradient_checkpointing:
        model.enable_input_require_grads()
    model.config.use_cache = False


def moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on a device."""
    return {name: value.to(device) for name, value in batch.items()}


def device_of(model: nn.Module) -> torch.device:
    """Where the model lies."""
    return next(model.parameters()).device
