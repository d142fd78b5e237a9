"""Options of quantising a base model by LQ-LoRA. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, model_validator

from artifacts.menu import Number
from train.options.common import MAX_TARGETS, ModuleName, Rank
from train.quantised.block_format import PRESETS, BlockFormat, ScaleDtype, grid

Width = Literal[2, 3, 4, 8]
MAX_ITERATIONS = 1000


class FormatGrid(BaseModel):
    """The formats among which each matrix gets one: every combination of these values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Annotated[list[Width], Field(min_length=1, max_length=4)] = Field([2, 3, 4, 8], description="Of a weight.")
    scale_bits: Annotated[list[Width], Field(min_length=1, max_length=4)] = Field(
        [2, 3, 4, 8], description="Of the scale of a block of weights."
    )
    scale_dtypes: Annotated[list[ScaleDtype], Field(min_length=1, max_length=3)] = Field(
        ["bfloat16"],
        description="Of the scale of a block of scales. The others of the published grid, float16 and float32, hardly "
        "change the error: 144 formats instead of 432.",
    )
    blocks: Annotated[list[Literal[16, 32, 64]], Field(min_length=1, max_length=3)] = Field(
        [16, 32, 64], description="Weights that share a scale."
    )
    scales: Annotated[list[Literal[16, 64, 256]], Field(min_length=1, max_length=3)] = Field(
        [16, 64, 256], description="Scales that share a scale of their own."
    )

    @property
    def formats(self) -> list[BlockFormat]:
        """Each once, the fewest bits first."""
        return sorted(
            set(grid(self.bits, self.scale_bits, self.scale_dtypes, self.blocks, self.scales)),
            key=lambda item: (item.bits_per_weight, item),
        )


class QuantisationOptions(BaseModel):
    """LQ-LoRA, arXiv:2311.12023: every weight becomes Q + L1·L2, Q in a few bits and L1·L2 of rank r."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: Rank = Field(
        64,
        description="r of L1·L2, and of every adapter that is trained on the result; below the smaller side of every "
        "quantised weight.",
    )
    budget_bits: Annotated[Number, Field(gt=2, le=8.625)] | None = Field(
        None,
        description="Bits per weight, the mean over the quantised matrices and without L1·L2: an integer program gives "
        "each matrix its format. 2.5 to 4 were studied.",
    )
    preset: Literal["nf3", "nf4"] | None = Field(
        None,
        description="One format for all instead of a budget: 3.127 or 4.127 bits per weight, a few thousandths "
        "more in a matrix that 256 blocks of 64 do not divide. Without a budget nf4 is taken.",
    )
    grid: FormatGrid = Field(default_factory=FormatGrid, description="With budget_bits: the formats to choose from.")
    num_iterations: Annotated[StrictInt, Field(ge=1, le=MAX_ITERATIONS)] = Field(
        100, description="T: most rounds of decomposing and quantising; they end when the error rises."
    )
    rtol: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.0, description="End the rounds also when one gains less than this share of the error."
    )
    cost_iterations: Annotated[StrictInt, Field(ge=1, le=MAX_ITERATIONS)] = Field(
        20, description="With budget_bits: most rounds while every format is tried on every matrix."
    )
    cost_rtol: Annotated[Number, Field(ge=0, lt=1)] = Field(1e-3, description="As rtol, meanwhile.")
    oversampling: Annotated[StrictInt, Field(ge=0, le=1024)] | None = Field(
        10,
        description="Dimensions beside r of the random subspace in which the low-rank part is found; null computes the "
        "exact SVD in every round, which is slower.",
    )
    polish: StrictBool = Field(True, description="Fit L1·L2 to Q once more at the end.")
    target_modules: Literal["all-linear"] | Annotated[list[ModuleName], Field(min_length=1, max_length=MAX_TARGETS)] = (
        Field(
            "all-linear",
            description="Which linear layers are quantised: the ends of their paths; all-linear is every one but the "
            "output head.",
        )
    )
    seed: Annotated[StrictInt, Field(ge=0, le=2**32 - 1)] = Field(0, description="Of the random subspaces.")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.budget_bits is not None and self.preset is not None:
            raise ValueError("budget_bits and preset exclude each other")
        return self

    @property
    def formats(self) -> list[BlockFormat]:
        """What a matrix can become; with a preset the first of these that fits it."""
        return self.grid.formats if self.budget_bits is not None else list(PRESETS[self.preset or "nf4"])
