"""OLoRA (arXiv:2406.01775), by PEFT."""

from __future__ import annotations

from typing import Any

from train.methods.changed_base import ChangedBase
from train.options.baselines import OloraOptions


class Olora(ChangedBase[OloraOptions]):
    """B₀ and A₀ are the first r columns of Q and rows of R of W = Q·R."""

    def fields(self) -> dict[str, Any]:
        return {"init_lora_weights": "olora"}
