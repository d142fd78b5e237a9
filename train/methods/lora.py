"""LoRA (arXiv:2106.09685), by PEFT."""

from __future__ import annotations

from typing import Any, TypeVar

from peft import LoraConfig

from train.continuation import Start, alpha_of
from train.methods.peft_adapter import PeftMethod
from train.options.baselines import LoraOptions
from train.options.common import LowRankOptions
from train.protocol import MethodContext

Options = TypeVar("Options", bound=LowRankOptions)


class LoraFamily(PeftMethod[Options]):
    """Methods that are PEFT's LoRA with some fields set."""

    def fields(self) -> dict[str, Any]:
        """What the method sets besides rank, alpha, dropout and the targets."""
        return {}

    def config(self, context: MethodContext) -> LoraConfig:
        options = self.options
        ranks, alphas = _patterns(options, context.start)
        return LoraConfig(
            task_type=context.task_type,
            r=options.rank,
            lora_alpha=options.numerator,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            lora_dropout=options.dropout,
            target_modules=list(context.targets),
            modules_to_save=list(context.whole) or None,
            **self.fields(),
        )


def _patterns(options: LowRankOptions, start: Start | None) -> tuple[dict[str, int], dict[str, float]]:
    """Ranks and alphas of the layers in which the adapter that is trained on differs from the options."""
    layers = {} if start is None else start.layers
    ranks = {path: module.rank for path, module in layers.items() if module.rank != options.rank}
    alphas = {path: alpha_of(options, module) for path, module in layers.items()}
    return ranks, {path: alpha for path, alpha in alphas.items() if alpha != options.numerator}


class Lora(LoraFamily[LoraOptions]):
    """scaling = alpha/r."""

    def fields(self) -> dict[str, Any]:
        return {"init_lora_weights": "gaussian" if self.options.initialisation == "gaussian" else True}
