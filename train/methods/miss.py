"""MiSS (arXiv:2409.15371), by PEFT."""

from __future__ import annotations

from peft import MissConfig

from train.methods.peft_adapter import PeftMethod
from train.options.baselines import MissOptions
from train.protocol import MethodContext


class Miss(PeftMethod[MissOptions]):
    """The balanced form, which PEFT calls the default."""

    def config(self, context: MethodContext) -> MissConfig:
        return MissConfig(
            task_type=context.task_type,
            r=self.options.rank,
            miss_dropout=self.options.dropout,
            target_modules=list(context.targets),
        )
