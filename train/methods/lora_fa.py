"""LoRA-FA (arXiv:2308.03303), by PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft.optimizers import create_lorafa_optimizer
from torch import nn

from train.methods.lora import LoraFamily
from train.options.baselines import LoraFaOptions

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from train.settings import TrainingSettings


class LoraFa(LoraFamily[LoraFaOptions]):
    """lora_A is frozen; PEFT's optimiser projects the gradient of lora_B by (A·Aᵀ)⁻¹."""

    def fields(self) -> dict[str, Any]:
        return {"init_lora_weights": "gaussian" if self.options.initialisation == "gaussian" else True}

    def optimizer(self, model: nn.Module, settings: TrainingSettings) -> Optimizer:
        made: Optimizer = create_lorafa_optimizer(
            model,
            r=self.options.rank,
            lora_alpha=self.options.numerator,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        return made
