"""Options of prompt tuning. Imports no torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StrictInt, StringConstraints, field_validator

from artifacts.errors import FieldError
from train.options.common import Circumstances, TrainOptions

USUAL_RATE = 2e-3
_SLOW = 1e-3


class PromptTuningOptions(TrainOptions):
    """Prompt tuning, arXiv:2104.08691: vectors before the input's are learned, and no weight is changed."""

    adapts_layers: ClassVar[bool] = False

    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="Prompt tuning adapts no layer: leave it out."
    )
    virtual_tokens: Annotated[StrictInt, Field(ge=1, le=1000)] = Field(
        20, description="Learned vectors before the input (arXiv:2104.08691, section 3.2: little is gained beyond 20)."
    )
    initial_text: Annotated[str, StringConstraints(min_length=1, max_length=10_000)] | None = Field(
        "Answer the following question correctly:",
        description="Text whose words the vectors start as, cut or repeated to their number (the default is that of "
        "arXiv:2405.17258, appendix A.2); null: words drawn from the vocabulary.",
    )

    @field_validator("target_modules")
    @classmethod
    def _none_named(cls, value: object) -> object:
        if value != "all-linear":
            raise ValueError("prompt tuning adapts no layer: leave it out")
        return value

    def parameters_of(self, d_out: int, d_in: int) -> int:
        del d_out, d_in
        return 0

    def parameters_beside(self, width: int) -> int:
        return self.virtual_tokens * width

    def problems(self, known: Circumstances) -> list[FieldError]:
        if known.packed:
            return [
                FieldError(
                    "/task/packing",
                    "prompt tuning puts its vectors before a row, and rows that are joined would share them",
                )
            ]
        return []

    def warnings(self, known: Circumstances) -> list[str]:
        rate = known.training.learning_rate
        if rate >= _SLOW:
            return []
        return [
            f"A learning rate of {rate:g} is low for prompt tuning: {USUAL_RATE:g} is usual (arXiv:2405.17258, A.2)."
        ]
