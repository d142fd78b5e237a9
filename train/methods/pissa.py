"""PiSSA (arXiv:2404.02948), by PEFT."""

from __future__ import annotations

from typing import Any

from train.methods.changed_base import ChangedBase
from train.options.baselines import PissaOptions


class Pissa(ChangedBase[PissaOptions]):
    """B₀·A₀ are the r largest singular components of W."""

    def fields(self) -> dict[str, Any]:
        iterations = self.options.iterations
        return {"init_lora_weights": "pissa" if iterations is None else f"pissa_niter_{iterations}"}
