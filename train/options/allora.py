"""Options of ALLoRA. Imports no torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, StrictBool, ValidationInfo, field_validator

from artifacts.menu import Number
from train.options.common import Alpha, Circumstances, Rank, TrainOptions

Positive = Annotated[Number, Field(gt=0)]

DEFAULT_ETA = 2.0
SENSIBLE_ETA = (0.5, 8.0)
# 1/η² is a float32 number in the training; outside of its normal range η would be another one, or infinite.
_LEAST_INVERSE, _LARGEST_INVERSE = 2.0**-126, 2.0**127


class AlloraOptions(TrainOptions):
    """ALLoRA, arXiv:2410.09692: row i of the gradient of ΔW = B·A is multiplied by 1/√(‖(B·A)_i‖ + 1/η²)."""

    rank: Rank = Field(
        16,
        description="r; at most the smaller side of every adapted weight (the paper: 4 to 64; on LLaMA 16 and 32).",
    )
    eta: Positive | None = Field(
        None,
        description="η, the factor of a row that is still 0: LoRA's learning rate at the start is η times "
        "training.learning_rate. Sensible from 0.5 to 8; unset with eta_sq unset: 2.",
    )
    eta_sq: Positive | None = Field(
        None, description="η², as the paper's tables give it (1, 2 or 4). Give this or eta, not both."
    )
    placement: Literal["gradient", "update"] = Field(
        "gradient",
        description="What is multiplied: the gradient, as published, which Adam all but undoes; or what the optimiser "
        "makes of it, so that η acts under adamw too.",
    )
    dropout: Number = Field(0.0, description="ALLoRA has none; nothing but 0 is taken.")
    alpha: Alpha | None = Field(None, description="ALLoRA's scaling is 1; nothing but the rank is taken.")
    use_rslora: StrictBool = Field(False, description="ALLoRA's scaling is 1; nothing but false is taken.")
    use_dora: StrictBool = Field(False, description="ALLoRA learns no norms apart; nothing but false is taken.")

    @field_validator("eta", "eta_sq")
    @classmethod
    def _finite_inverse(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is None:
            return None
        least, largest = _LARGEST_INVERSE**-1, _LEAST_INVERSE**-1
        if info.field_name == "eta":
            least, largest = math.sqrt(least), math.sqrt(largest)
        if not least <= value <= largest:
            raise ValueError(f"must be between {least:.3g} and {largest:.3g}, for 1/η² is a float32 number")
        return value

    @field_validator("eta_sq")
    @classmethod
    def _one_eta(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("eta") is not None:
            raise ValueError("give eta or eta_sq, not both")
        return value

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, value: float) -> float:
        if value != 0:
            raise ValueError("ALLoRA does without dropout; leave it out or give 0")
        return value

    @field_validator("alpha")
    @classmethod
    def _no_scaling(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and value != info.data.get("rank", value):
            raise ValueError("ALLoRA's scaling alpha/r is 1; leave alpha out or give the rank")
        return value

    @field_validator("use_rslora", "use_dora")
    @classmethod
    def _plain(cls, value: bool, info: ValidationInfo) -> bool:
        if value:
            other = {"use_rslora": "rank-stabilised scaling", "use_dora": "DoRA"}[str(info.field_name)]
            raise ValueError(f"ALLoRA can not be combined with {other}; leave it out or give false")
        return value

    @property
    def largest_rank(self) -> int | None:
        return self.rank

    def parameters_of(self, d_out: int, d_in: int) -> int:
        return self.rank * (d_out + d_in)

    @property
    def inverse_eta_sq(self) -> float:
        """1/η²."""
        if self.eta_sq is not None:
            return 1.0 / self.eta_sq
        return (self.eta or DEFAULT_ETA) ** -2

    def warnings(self, known: Circumstances) -> list[str]:
        found = []
        if self.placement == "gradient" and known.training.optimizer == "adamw":
            found.append(
                "The optimiser adamw divides by the size of the gradient, so that eta acts only weakly with placement "
                "'gradient': take placement 'update' or the optimiser sgd if it shall act as a learning rate."
            )
        eta = self.inverse_eta_sq**-0.5
        if eta > SENSIBLE_ETA[1]:
            low, high = SENSIBLE_ETA
            found.append(
                f"An eta of {eta:g} is above the sensible range ({low:g} to {high:g}): the first steps are taken with "
                f"{eta:g} times the learning rate."
            )
        return found
