"""LoRA+ (arXiv:2402.12354), by PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from train.methods.lora import LoraFamily
from train.options.baselines import LoraPlusOptions

if TYPE_CHECKING:
    from train.settings import TrainingSettings


class LoraPlus(LoraFamily[LoraPlusOptions]):
    """AdamW with two learning rates."""

    def fields(self) -> dict[str, Any]:
        return {"init_lora_weights": "gaussian" if self.options.initialisation == "gaussian" else True}

    def optimizer(self, model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=settings.learning_rate,
            loraplus_lr_ratio=self.options.ratio,
            loraplus_weight_decay=settings.weight_decay,
        )
        return made
