"""FFA-LoRA (arXiv:2403.12313) on one model: a LoRA whose lora_A stays as it was drawn. The rounds of a federated run
are in `train.federation`."""

from __future__ import annotations

from torch import nn

from train.methods.lora import LoraFamily
from train.options.ffa_lora import FfaLoraOptions
from train.protocol import MethodContext


class FfaLora(LoraFamily[FfaLoraOptions]):
    """lora_A is Kaiming-uniform from the seed (PEFT's own start), lora_B begins at 0."""

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        prepared = super().prepare(model, context)
        if self.options.freeze_a:
            for name, parameter in prepared.named_parameters():
                if ".lora_A." in name:
                    parameter.requires_grad_(False)
        return prepared
