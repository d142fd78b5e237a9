"""Options of LoRA-BERT. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from artifacts.errors import FieldError
from train.options.common import Circumstances, LowRankOptions

USUAL_RATES = {"full": (1e-5, 2e-4), "lora": (5e-4, 1e-2)}
"""Peak learning rates: round the published 5e-5 of all weights, and round 1e-3 to 5e-3 of an adapter."""
_OF_ADAPTERS = ("rank", "alpha", "dropout", "target_modules")


class LoraBertOptions(LowRankOptions):
    """LoRA-BERT, arXiv:2411.08073: a BERT of k-mers tells lncRNA from mRNA. The LoRA of its name is no low rank.

    The published recipe is ten epochs of 64 rows at 5e-5, AdamW, falling along a line, twice: on a larger set from
    first values, then on a smaller one with 500 steps of warm-up and a weight decay of 0.001.
    """

    mode: Literal["lora", "full"] = Field(
        "lora",
        description="full: the published recipe, in which every weight is trained; a base model comes out. lora: the "
        "base is frozen and gets a low-rank adapter, and its classifier and pooler are trained; this is Rankwise's "
        "own.",
    )

    @property
    def largest_rank(self) -> int | None:
        return self.rank if self.mode == "lora" else None

    @property
    def trains_base(self) -> bool:
        return self.mode == "full"

    def parameters_of(self, d_out: int, d_in: int) -> int:
        return d_out * d_in if self.trains_base else super().parameters_of(d_out, d_in)

    def problems(self, known: Circumstances) -> list[FieldError]:
        if not self.trains_base:
            return []
        found = [
            FieldError(f"/parameters/{name}", f"{name} is of an adapter; mode full trains every weight: leave it out")
            for name in _OF_ADAPTERS
            if name in self.model_fields_set
        ]
        if known.training.precision != "float32":
            problem = f"mode full trains the weights themselves, in float32, not in {known.training.precision}"
            found.append(FieldError("/training/precision", problem))
        return found

    def warnings(self, known: Circumstances) -> list[str]:
        low, high = USUAL_RATES[self.mode]
        rate = known.training.learning_rate
        if low <= rate <= high:
            return []
        usual = "5e-5" if self.trains_base else "1e-3 to 5e-3"
        return [f"The learning rate {rate:g} is far from the {usual} that mode {self.mode} usually takes."]
