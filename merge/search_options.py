"""What a search of merges is asked for: methods, ranges of weights and parameters, a budget. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StringConstraints, model_validator

from artifacts.menu import Number
from merge.options import MAX_RANK

MAX_TRIALS = 1000
MAX_SEARCHED = 32
_SECONDS_PER_WEEK = 7 * 86400

Bound = Annotated[Number, Field(ge=-1e6, le=1e6)]


class Range(BaseModel):
    """Numbers from `low` to `high`, both included."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: Bound
    high: Bound
    log: StrictBool = Field(False, description="Draw by ratios rather than by differences; needs low above 0.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError("low must be below high")
        if self.log and self.low <= 0:
            raise ValueError("log needs a low above 0")
        return self


class SearchedMethod(BaseModel):
    """One of the methods that are tried."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = Field(description="See GET /methods.")
    parameters: dict[str, Any] = Field(
        default_factory=dict,
        description="Of the method: a value, which is fixed, or {low, high, log?}, or {choices: […]}.",
    )
    label: Annotated[str, StringConstraints(min_length=1, max_length=80, pattern=r"^[^\x00]*$")] | None = Field(
        None, description="What it is called in the report; unset, as its method."
    )


class SearchOptions(BaseModel):
    """A search of merges: trials of methods, weights and parameters, each measured on data; the best is published."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    methods: list[SearchedMethod] = Field(
        default=[SearchedMethod(method=name) for name in ("svd", "lego", "tsv_m", "core_space", "knots", "pico")],
        min_length=1,
        max_length=MAX_SEARCHED,
        description="The methods that are tried. Each is tried once with the weights of the request and the first of "
        "its choices, as far as they lie in the ranges; what comes then is chosen by what was found.",
    )
    weights: list[Range | None] | None = Field(
        None,
        min_length=1,
        description="Ranges of the adapters' weights: a single one for all, or one for each in the order of the "
        "request, where null keeps its weight. Unset, all weights are those of the request.",
    )
    ranks: list[Annotated[StrictInt, Field(ge=1, le=MAX_RANK)] | Literal["exact", "r", "2r"]] | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="Output ranks that are tried, in the methods that take a rank and do not fix one of their own.",
    )
    trials: Annotated[StrictInt, Field(ge=1, le=MAX_TRIALS)] = Field(20, description="Most trials.")
    seconds: Annotated[Number, Field(gt=0, le=_SECONDS_PER_WEEK)] | None = Field(
        None,
        description="No trial begins after so many seconds of trials, which an interruption does not set back. With "
        "such a budget the result depends on the speed of the machine.",
    )
    sampler: Literal["tpe", "random"] = Field(
        "tpe",
        description="What chooses the next trial: Optuna's tree-structured Parzen estimator (arXiv:2304.11127), which "
        "learns from those before, or chance.",
    )
    startup_trials: Annotated[StrictInt, Field(ge=1, le=MAX_TRIALS)] = Field(
        10, description="Trials before the estimator has a say; until then chance chooses."
    )
    seed: Annotated[StrictInt, Field(ge=0, lt=2**32)] = Field(0, description="Seed of the sampler.")
