"""Options of the methods that PEFT trains. Imports no torch."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, StrictInt, model_validator

from artifacts.menu import Number
from train.options.common import Alpha, Dropout, LowRankOptions, Rank, TrainOptions


class LoraOptions(LowRankOptions):
    """LoRA, arXiv:2106.09685: scaling alpha/r, lora_B starts at 0."""

    layers_may_differ: ClassVar[bool] = True

    initialisation: Literal["kaiming", "gaussian"] = Field(
        "kaiming",
        description="How lora_A starts: kaiming is uniform, as in the authors' code; gaussian is normal with standard "
        "deviation 1/r.",
    )


class RsloraOptions(LoraOptions):
    """Rank-stabilised LoRA, arXiv:2312.03732: scaling alpha/√r, so that large ranks learn as fast as small ones."""

    def alpha_of(self, scaling: float, rank: int) -> float:
        return scaling * math.sqrt(rank)


class DoraOptions(LoraOptions):
    """DoRA, arXiv:2402.09353: the norms of the rows of W + ΔW are learned apart from their directions."""

    def parameters_of(self, d_out: int, d_in: int) -> int:
        return super().parameters_of(d_out, d_in) + d_out


class ChangedBaseOptions(LowRankOptions):
    """Options of the methods that take the start of B·A out of W, and so end at twice the rank."""

    @property
    def certain_rank(self) -> int:
        return 2 * self.rank


class PissaOptions(ChangedBaseOptions):
    """PiSSA, arXiv:2404.02948: A and B start at the principal singular components of W, which W loses."""

    iterations: Annotated[StrictInt, Field(ge=1, le=1000)] | None = Field(
        None, description="Subspace iterations of a randomised SVD: faster on large layers; unset, the SVD is exact."
    )


class OloraOptions(ChangedBaseOptions):
    """OLoRA, arXiv:2406.01775: B and A start at the first columns and rows of the QR decomposition of W."""


class EvaOptions(LowRankOptions):
    """EVA, arXiv:2410.07170: A starts at the directions in which the layers' inputs vary most on the training rows."""

    rho: Annotated[Number, Field(ge=1, le=16)] = Field(
        2.0, description="A layer may get up to ρ·r of the ranks of all layers; 1 leaves r to each."
    )
    tau: Annotated[Number, Field(ge=0, le=1)] = Field(
        0.99, description="The search ends when the directions of two batches agree to this cosine."
    )


class LoraPlusOptions(LoraOptions):
    """LoRA+, arXiv:2402.12354: B learns faster than A."""

    ratio: Annotated[Number, Field(ge=1, le=1000)] = Field(
        16.0, description="Learning rate of lora_B over that of lora_A, which is training.learning_rate."
    )


class LoraFaOptions(LoraOptions):
    """LoRA-FA, arXiv:2308.03303: A stays as it starts, B follows the gradient projected onto A's rows."""

    def parameters_of(self, d_out: int, d_in: int) -> int:
        return self.rank * d_out


class AdaloraOptions(TrainOptions):
    """AdaLoRA, arXiv:2303.10512: ΔW = B·diag(E)·A; entries of E that matter least are set to 0 on the way."""

    initial_rank: Rank = Field(
        12, description="Rank that every layer begins with; at most the smaller side of every adapted weight."
    )
    target_rank: Rank = Field(8, description="Mean rank of the layers at the end; below initial_rank.")
    alpha: Alpha = Field(32.0, description="Numerator of the scaling, whose denominator is initial_rank.")
    dropout: Dropout = Field(0.0, description="Share of the layer's inputs that lora_A does not see in a step.")
    warmup: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.1, description="Share of the steps before the first entry is set to 0."
    )
    final: Annotated[Number, Field(ge=0, lt=1)] = Field(0.3, description="Share of the steps after the last one is.")
    interval: Annotated[StrictInt, Field(ge=1, le=1_000_000)] = Field(
        1, description="Steps between two rounds of setting entries to 0."
    )
    orthogonality: Annotated[Number, Field(ge=0, le=1e3)] = Field(
        0.5, description="Weight in the loss of how far A and B are from orthogonal."
    )

    @property
    def largest_rank(self) -> int | None:
        return self.initial_rank

    def parameters_of(self, d_out: int, d_in: int) -> int:
        return self.initial_rank * (d_out + d_in + 1)

    @model_validator(mode="after")
    def _room(self) -> AdaloraOptions:
        if self.target_rank >= self.initial_rank:
            raise ValueError("target_rank must be below initial_rank")
        if self.warmup + self.final >= 1:
            raise ValueError("warmup and final leave no step in between")
        return self


class VeraOptions(TrainOptions):
    """VeRA, arXiv:2310.11454: A and B are random, frozen and shared by all layers; each layer learns two vectors."""

    rank: Rank = Field(
        256, description="r of the shared matrices; larger than with LoRA, for it costs r + d_out parameters a layer."
    )
    dropout: Dropout = Field(0.0, description="Share of the layer's inputs that A does not see in a step.")
    initial_scale: Annotated[Number, Field(gt=0, le=10)] = Field(
        0.1, description="First value of the vector between A and B; small values do better (table 6c)."
    )

    def parameters_of(self, d_out: int, d_in: int) -> int:
        return self.rank + d_out


class MissOptions(TrainOptions):
    """MiSS, arXiv:2409.15371: one matrix of r×d_out per layer, added to W after the inputs are summed in r groups."""

    rank: Rank = Field(64, description="r; at most the smaller side of every adapted weight.")
    dropout: Dropout = Field(0.0, description="Share of the layer's inputs that the adapter does not see in a step.")

    @property
    def largest_rank(self) -> int | None:
        return self.rank

    def parameters_of(self, d_out: int, d_in: int) -> int:
        return self.rank * d_out
