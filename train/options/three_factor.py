"""Options of the methods that learn ΔW = s·B·R·A, with R of r×r between two outer factors. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, StrictBool, StrictInt, ValidationInfo, field_validator

from artifacts.errors import FieldError
from artifacts.menu import Number
from train.options.common import Alpha, Circumstances, Dropout, Rank, TrainOptions

if TYPE_CHECKING:
    from train.settings import TrainingSettings

FEW_SAMPLES = 16
MOST_ETA = 1e-5  # of full fine-tuning; the rates at which R alone is trained would destroy the model in one such step
NOTICEABLE_RANK = 64
TYPICAL_DEVIATION = 0.02  # of the weights of a language model, for a figure that can be told before any is loaded

MemoryMib = Annotated[StrictInt, Field(ge=1, le=4 * 1024 * 1024)]


class ThreeFactorOptions(TrainOptions):
    """What all of them understand: lora_A (r×d_in), lora_R (r×r) and lora_B (d_out×r)."""

    rank: Rank = Field(32, description="r; at most the smaller side of every adapted weight.")
    dropout: Dropout = Field(0.0, description="Share of the layer's inputs that lora_A does not see in a step.")

    @property
    def largest_rank(self) -> int | None:
        return self.rank

    @property
    def certain_rank(self) -> int:
        return self.rank

    @property
    def scaling(self) -> float:
        """s."""
        return 1.0

    def parameters_of(self, d_out: int, d_in: int) -> int:
        del d_out, d_in
        return self.rank * self.rank


class LoraSbOptions(ThreeFactorOptions):
    """LoRA-SB, arXiv:2411.19557: the outer factors span the first step that full fine-tuning would take."""

    alpha: Alpha | None = Field(
        None, description="The scaling is 1 by construction: unset or the rank; anything else is refused."
    )
    samples: Annotated[StrictInt, Field(ge=1, le=10_000_000)] | None = Field(
        None,
        description="Training rows that the first step is estimated on; unset, a thousandth of them, at least "
        f"{FEW_SAMPLES} or all.",
    )
    update: Literal["sign", "raw"] = Field(
        "sign",
        description="sign: the step of AdamW, -eta·sign(gradient). raw: that of plain descent, -eta·gradient; made for "
        "the optimizer sgd, an experiment with adamw.",
    )
    eta: Annotated[Number, Field(gt=0, le=10)] | None = Field(
        None,
        description="Length of the estimated step; unset, training.learning_rate over the warm-up steps (at least 1), "
        f"and with sign at most {MOST_ETA:g}: the model is changed by it before training begins.",
    )
    gradient_memory: MemoryMib = Field(
        4096,
        description="MiB that the sums of gradients may take at once (4 bytes a weight); what does not fit is "
        "estimated in further passes over the samples.",
    )

    @field_validator("alpha")
    @classmethod
    def _alpha_is_rank(cls, alpha: float | None, info: ValidationInfo) -> float | None:
        rank = info.data.get("rank")
        if alpha is not None and rank is not None and alpha != rank:
            raise ValueError(f"the scaling of LoRA-SB is 1, so alpha can only be the rank, {rank}")
        return alpha

    def step_length(self, training: TrainingSettings) -> float:
        """The eta in force: that of the first warm-up step."""
        if self.eta is not None:
            return self.eta
        first = training.learning_rate / max(1, training.warmup_steps)
        return min(first, MOST_ETA) if self.update == "sign" else first

    def problems(self, known: Circumstances) -> list[FieldError]:
        found = super().problems(known)
        if self.samples is not None and known.rows is not None and self.samples > known.rows:
            found.append(
                FieldError(
                    "/parameters/samples",
                    f"{self.samples} samples were asked for, of at most {known.rows} training rows",
                )
            )
        return found

    def warnings(self, known: Circumstances) -> list[str]:
        found = super().warnings(known)
        if self.samples is not None and self.samples < FEW_SAMPLES:
            found.append(
                f"The first step is estimated on {self.samples} rows; below {FEW_SAMPLES} the layers get directions of "
                "single rows."
            )
        optimizer = known.training.optimizer
        if self.update == "raw" and optimizer == "adamw":
            found.append("update: raw is made for plain gradient descent; with adamw it is an experiment.")
        if self.update == "sign" and optimizer == "sgd":
            found.append("With the optimizer sgd the best directions are those of update: raw.")
        return found


class _Scaled(ThreeFactorOptions):
    """With a scaling of the user's own."""

    alpha: Alpha | None = Field(None, description="Numerator of the scaling; unset, the scaling is 1.")

    @property
    def scaling(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


class LoraXsOptions(_Scaled):
    """LoRA-XS, arXiv:2405.17604: the outer factors are the principal singular vectors of W; only R is trained."""


class SloraOptions(_Scaled):
    """SLoRA, arXiv:2502.14482: LoRA with a trained r×r matrix between A and B; B starts at 0."""

    rank: Rank = Field(128, description="r; at most the smaller side of every adapted weight (the paper: 1 to 128).")
    use_rslora: StrictBool = Field(False, description="Scaling alpha/√r instead of alpha/r.")

    @property
    def scaling(self) -> float:
        if self.alpha is None or not self.use_rslora:
            return super().scaling
        return float(self.alpha / self.rank**0.5)

    def parameters_of(self, d_out: int, d_in: int) -> int:
        return self.rank * (d_out + d_in + self.rank)


class NloraOptions(SloraOptions):
    """NLoRA, arXiv:2502.14482: as SLoRA, started at the first r rows and columns of W."""

    initialisation: Literal["nystrom", "nystrom_pinv"] = Field(
        "nystrom",
        description="nystrom, as the authors do: lora_A, lora_R and lora_B are the first r rows of W, the block where "
        "they cross and the first r columns. nystrom_pinv, experimental: lora_R is the pseudo-inverse of that block.",
    )
    residual: StrictBool | None = Field(
        None,
        description="Take s·B·R·A out of W in memory, so that training begins at the base model; the export is then a "
        "LoRA of rank 2r. Unset: only with nystrom_pinv, which would destroy the model without it.",
    )

    @field_validator("residual")
    @classmethod
    def _sound(cls, residual: bool | None, info: ValidationInfo) -> bool | None:
        inverse = info.data.get("initialisation") == "nystrom_pinv"
        if inverse and residual is False:
            raise ValueError("initialisation nystrom_pinv destroys the model without residual")
        if info.data.get("use_rslora") and not (inverse if residual is None else residual):
            raise ValueError("use_rslora would multiply what the start adds to W: it needs residual")
        return residual

    @property
    def changes_base(self) -> bool:
        """Whether W is changed in memory, so that the model begins as it was."""
        return self.initialisation == "nystrom_pinv" if self.residual is None else self.residual

    @property
    def certain_rank(self) -> int:
        return 2 * self.rank if self.changes_base else self.rank

    def warnings(self, known: Circumstances) -> list[str]:
        found = super().warnings(known)
        if not self.changes_base and self.scaling * self.rank >= NOTICEABLE_RANK:
            share = 100 * self.scaling * self.rank * TYPICAL_DEVIATION**2
            found.append(
                f"The start adds to the base model before the first step: at rank {self.rank} about {share:.0f} % of "
                f"every weight matrix, if its entries have a standard deviation of {TYPICAL_DEVIATION}. residual: true "
                "begins at the base model."
            )
        return found


class InttuneOptions(NloraOptions):
    """IntTune, arXiv:2502.14482: started as NLoRA, but only the r×r matrix is trained."""

    residual: StrictBool | None = Field(
        None,
        description="Take s·B·R·A out of W in memory, so that training begins at the base model. Unset: only with "
        "nystrom_pinv, which would destroy the model without it.",
    )

    def parameters_of(self, d_out: int, d_in: int) -> int:
        del d_out, d_in
        return self.rank * self.rank
