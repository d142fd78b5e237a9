"""The menu of training methods: every hyper-parameter with its default, range, unit and source. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StringConstraints

MAX_RANK = 16384
"""No weight matrix of a current model has a smaller side above this, so no useful rank does either."""
MAX_TARGETS = 1000

ModuleName = Annotated[str, StringConstraints(min_length=1, max_length=300, pattern=r"^[A-Za-z0-9_.\-]+$")]


class TrainOptions(BaseModel):
    """What every training method understands."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    target_modules: Literal["all-linear"] | Annotated[list[ModuleName], Field(min_length=1, max_length=MAX_TARGETS)] = (
        Field(
            "all-linear",
            description="Which linear layers are adapted: the ends of their paths, such as q_proj or "
            "layers.0.mlp.down_proj; all-linear is every one but the output head.",
        )
    )


class LowRankOptions(TrainOptions):
    """Options of the methods that learn ΔW = scaling·B·A with lora_A (r×d_in) and lora_B (d_out×r)."""

    rank: Annotated[StrictInt, Field(ge=1, le=MAX_RANK)] = Field(
        8, description="r; at most the smaller side of every adapted weight (arXiv:2106.09685, table 6: 4 to 8 do)."
    )
    alpha: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = Field(
        None, description="Numerator of the scaling; unset, it is chosen so that the scaling is 2."
    )
    dropout: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = Field(
        0.0, description="Share of the layer's inputs that lora_A does not see in a step."
    )

    @property
    def numerator(self) -> float:
        """The alpha in force."""
        return self.alpha if self.alpha is not None else 2.0 * self.rank


class LoraOptions(LowRankOptions):
    """LoRA, arXiv:2106.09685: scaling alpha/r, lora_B starts at 0."""

    initialisation: Literal["kaiming", "gaussian"] = Field(
        "kaiming",
        description="How lora_A starts: kaiming is uniform, as in the authors' code; gaussian is normal with standard "
        "deviation 1/r.",
    )


class RsloraOptions(LoraOptions):
    """Rank-stabilised LoRA, arXiv:2312.03732: scaling alpha/√r, so that large ranks learn as fast as small ones."""

    @property
    def numerator(self) -> float:
        return self.alpha if self.alpha is not None else 2.0 * float(self.rank) ** 0.5


class DoraOptions(LoraOptions):
    """DoRA, arXiv:2402.09353: the norms of the rows of W + ΔW are learned apart from their directions."""
