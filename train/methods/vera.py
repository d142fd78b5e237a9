"""VeRA (arXiv:2310.11454), by PEFT."""

from __future__ import annotations

from peft import VeraConfig

from train.methods.peft_adapter import PeftMethod
from train.options.baselines import VeraOptions
from train.protocol import MethodContext


class Vera(PeftMethod[VeraOptions]):
    """ΔW = diag(b)·B·diag(d)·A with b and d learned; the file holds A and B too, so that any PEFT gives the same."""

    def config(self, context: MethodContext) -> VeraConfig:
        return VeraConfig(
            task_type=context.task_type,
            r=self.options.rank,
            target_modules=list(context.targets),
            modules_to_save=list(context.whole) or None,
            vera_dropout=self.options.dropout,
            d_initial=self.options.initial_scale,
            projection_prng_key=context.seed,
            save_projection=True,
        )
