"""MiSS (arXiv:2409.15371), by PEFT."""

from __future__ import annotations

import json
from pathlib import Path

from peft import MissConfig
from peft.tuners.miss.layer import MissLayer
from torch import nn

from artifacts.miss_keys import SIDES_KEY
from train.methods.peft_adapter import ADAPTER, PeftMethod, adapter_tensors, write_adapter
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
            modules_to_save=list(context.whole) or None,
        )

    def export(self, model: nn.Module, directory: Path) -> None:
        """As PEFT has it, and in the metadata the sides of the layers: a merge of this adapter needs them."""
        config: MissConfig = model.peft_config[ADAPTER]  # type: ignore[index]
        base = model.base_model.model  # type: ignore[union-attr]
        sides = {
            name: [layer.out_features, layer.in_features]
            for name, layer in base.named_modules()  # type: ignore[union-attr]
            if isinstance(layer, MissLayer)
        }
        metadata = {SIDES_KEY: json.dumps(sides, sort_keys=True, separators=(",", ":"))}
        write_adapter(directory, adapter_tensors(model), config, metadata)
