"""Options of training on a base model in a few bits. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from artifacts.menu import Number
from train.options.common import Alpha, Rank, TrainOptions


class LqLoraOptions(TrainOptions):
    """LQ-LoRA, arXiv:2311.12023: on a base model that `POST /models/{id}/quantize` made, L1·L2 is trained beside Q."""

    target_modules: Literal["all-linear"] = Field(
        "all-linear",
        description="Always all layers that are quantised: in each of them the factors hold a part of the base model.",
    )
    rank: Rank | None = Field(
        None, description="r: that of the quantised base model, whose factors the training begins at; unset, just that."
    )
    alpha: Alpha = Field(
        16.0, description="Numerator of the scaling alpha/r; the training begins at the same model with each value."
    )
    dropout: Annotated[Number, Field(ge=0, le=0)] = Field(
        0.0,
        description="Nothing but 0 is taken: the factors hold base weights, which dropout would disturb.",
    )

    @property
    def largest_rank(self) -> int | None:
        return self.rank

    def parameters_of(self, d_out: int, d_in: int) -> int:
        return (self.rank or 0) * (d_out + d_in)
