"""Options of Bone. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from artifacts.errors import FieldError
from train.options.common import MAX_RANK, Circumstances, Dropout, Rank, TrainOptions

Variant = Literal["default", "mini", "bat_col", "bat_row"]
INIT_WEIGHTS: Mapping[Variant, Any] = {"default": True, "mini": "mini", "bat_col": "bat"}
"""Variant → what PEFT's MissConfig calls it: its `init_weights` chooses the algorithm. PEFT has no bat_row."""

_NO_SCALING = "Bone has no alpha and no scaling: ΔW is made of the trained matrix alone"
_NO_INIT = "Bone starts at 0 always; a random start would change the model before the first step"
REFUSED: Mapping[str, str] = {
    "alpha": _NO_SCALING,
    "lora_alpha": _NO_SCALING,
    "scaling": _NO_SCALING,
    "rslora": _NO_SCALING,
    "use_rslora": _NO_SCALING,
    "init_weights": _NO_INIT,
    "initialisation": _NO_INIT,
}
"""What users of LoRA or of PEFT's MissConfig may look for here, and why it is not."""


class BoneOptions(TrainOptions):
    """Bone, later DiSHA and MiSS, arXiv:2409.15371: one matrix D per layer, started at 0, that W's blocks share."""

    variant: Variant = Field(
        "default",
        description="default: ΔW repeats D (r×d_out) along the inputs. mini: along the outputs as well, D is r×mini_r. "
        "bat_col, bat_row: every r×r block of W is multiplied by its block of D, which is then added; a block is "
        "shared by a row of blocks (bat_col) or by a column of them (bat_row). PEFT's first BoneConfig was bat_col.",
    )
    rank: Rank = Field(
        64,
        description="r, the side of a block; at most the inputs of every adapted layer. With bat_col and bat_row it "
        "must divide both sides of every adapted weight.",
    )
    mini_r: Annotated[StrictInt, Field(ge=1, le=MAX_RANK)] = Field(
        64, description="Width of D in the variant mini; divides the outputs of every adapted layer."
    )
    dropout: Dropout = Field(
        0.0, description="Share of the layer's inputs that D does not see in a step; default and mini only."
    )
    lossy_rank: Rank | None = Field(
        None,
        description="bat_col and bat_row only: write a plain LoRA of this rank, cut from ΔW by SVD, in place of the "
        "exact adapter. It loses part of ΔW; the report says how much.",
    )

    @model_validator(mode="before")
    @classmethod
    def _nothing_of_lora(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            faults = [(name, reason) for name, reason in REFUSED.items() if name in values]
            if faults:
                raise _refusal(faults)
        return values

    @model_validator(mode="after")
    def _what_the_variant_takes(self) -> BoneOptions:
        faults = []
        if self.guided and self.dropout > 0:
            faults.append(("dropout", f"the variant {self.variant} has no dropout: it would be ignored"))
        if not self.guided and self.lossy_rank is not None:
            faults.append(("lossy_rank", f"the variant {self.variant} is a plain LoRA exactly; nothing need be lost"))
        if faults:
            raise _refusal(faults)
        return self

    @property
    def guided(self) -> bool:
        """Whether ΔW depends on W, so that it has full rank."""
        return self.variant in ("bat_col", "bat_row")

    @property
    def certain_rank(self) -> int:
        return 1 if self.guided else self.rank

    def parameters_of(self, d_out: int, d_in: int) -> int:
        return self.rank * {"mini": self.mini_r, "bat_row": d_in}.get(self.variant, d_out)

    def problems(self, known: Circumstances) -> list[FieldError]:
        return [
            FieldError(f"/parameters/{field}", message)
            for target in known.targets
            for field, message in self._faults_of(target.path, target.d_out, target.d_in)
        ]

    def warnings(self, known: Circumstances) -> list[str]:
        found = []
        if self.variant == "mini" and self.mini_r == 1:
            found.append("mini_r is 1: the update of every layer has rank 1.")
        if self.variant != "mini" and "mini_r" in self.model_fields_set:
            found.append(f"mini_r is ignored: the variant {self.variant} does not use it.")
        if self.lossy_rank is not None:
            found.append(
                f"The adapter that is written is a plain LoRA of rank {self.lossy_rank} and not what was trained: "
                f"ΔW of {self.variant} has full rank. own.export.relative_error of the report is what was lost."
            )
        return found

    def _faults_of(self, path: str, d_out: int, d_in: int) -> Iterator[tuple[str, str]]:
        rank, sides = self.rank, f"{path} ({d_out}×{d_in})"
        if rank > d_in:
            yield "rank", f"rank {rank} is above the {d_in} inputs of {sides}"
        elif self.guided and (d_out % rank or d_in % rank):
            which = " and ".join(f"{side}" for side in dict.fromkeys((d_out, d_in)) if side % rank)
            yield (
                "rank",
                f"{self.variant} needs a rank that divides both sides: {rank} does not divide {which} of {sides}",
            )
        if self.variant == "mini" and d_out % self.mini_r:
            yield "mini_r", f"mini_r {self.mini_r} does not divide the {d_out} outputs of {sides}"
        if self.lossy_rank is not None and self.lossy_rank > min(d_out, d_in):
            yield "lossy_rank", f"lossy_rank {self.lossy_rank} is above the smaller side of {sides}"


def _refusal(faults: list[tuple[str, str]]) -> ValidationError:
    """Raised in a validator, it keeps the place of each finding."""
    details = [
        InitErrorDetails(type=PydanticCustomError("refused", "{reason}", {"reason": reason}), loc=(field,), input=None)
        for field, reason in faults
    ]
    return ValidationError.from_exception_data("BoneOptions", details)
