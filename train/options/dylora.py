"""Options of DyLoRA (arXiv:2210.07558). Imports no torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, StrictBool, ValidationInfo, field_validator

from artifacts.menu import Number
from train.options.common import MAX_RANK, Alpha, Circumstances, LowRankOptions, Rank

_FEW = 10

Weight = Annotated[Number, Field(ge=0, le=1e9)]


class DyloraOptions(LowRankOptions):
    """DyLoRA: one training of an adapter whose first b components are the adapter of rank b."""

    rank: Rank = Field(8, description="The largest rank, r; at most the smaller side of every adapted weight.")
    alpha: Alpha = Field(16.0, description="Numerator of the scaling; see scale_mode.")
    min_rank: Rank = Field(1, description="The smallest rank that is trained; at most rank.")
    ranks: Annotated[list[Rank], Field(min_length=1, max_length=MAX_RANK)] | None = Field(
        None,
        description="The ranks that are trained, rising, from min_rank to rank, which must be the last; unset: every "
        "one. Powers of two need fewer steps.",
    )
    distribution: Literal["uniform"] | Annotated[list[Weight], Field(min_length=1, max_length=MAX_RANK)] = Field(
        "uniform",
        description="How often each rank is drawn: alike, or by one weight for each of the ranks. A rank of weight 0 "
        "is not trained.",
    )
    frozen: StrictBool = Field(
        True,
        description="A step at rank b trains component b alone (with ranks that are left out: those since the rank "
        "before it), with the ones before it as they are; false: all b.",
    )
    update_scope: Literal["dense", "strict"] = Field(
        "dense",
        description="dense: the optimiser's moments and weight decay also move components that the step does not "
        "train, as in the authors' code; strict: they stand still. strict needs frozen.",
    )
    scale_mode: Literal["alpha_over_b", "constant"] = Field(
        "alpha_over_b",
        description="Scaling at rank b: alpha/b, as published, or alpha/rank at every rank, with which the large ranks "
        "learn better.",
    )

    @field_validator("min_rank")
    @classmethod
    def _not_above_the_rank(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data.get("rank", value):
            raise ValueError(f"{value} is above rank, which is {info.data['rank']}")
        return value

    @field_validator("ranks")
    @classmethod
    def _in_order(cls, value: list[int] | None, info: ValidationInfo) -> list[int] | None:
        if value is None or not {"rank", "min_rank"} <= info.data.keys():
            return value
        largest, smallest = info.data["rank"], info.data["min_rank"]
        if any(first >= second for first, second in pairwise(value)):
            raise ValueError("must rise")
        if value[0] < smallest or value[-1] > largest:
            raise ValueError(f"must lie between min_rank and rank, {smallest} and {largest}")
        if value[-1] != largest:
            raise ValueError(
                f"must end with rank, which is {largest}: components {value[-1] + 1} to {largest} would "
                "never be trained"
            )
        return value

    @field_validator("distribution")
    @classmethod
    def _one_weight_a_rank(cls, value: str | list[float], info: ValidationInfo) -> str | list[float]:
        if isinstance(value, str) or not {"rank", "min_rank", "ranks"} <= info.data.keys():
            return value
        ranks = _listed(info.data["rank"], info.data["min_rank"], info.data["ranks"])
        if len(value) != len(ranks):
            raise ValueError(f"has {len(value)} weights for {len(ranks)} ranks ({ranks[0]} to {ranks[-1]})")
        if sum(value) <= 0:
            raise ValueError("all weights are 0")
        if value[-1] == 0:
            raise ValueError("the largest rank has weight 0: its components would never be trained")
        return value

    @field_validator("update_scope")
    @classmethod
    def _strict_needs_frozen(cls, value: str, info: ValidationInfo) -> str:
        if value == "strict" and info.data.get("frozen") is False:
            raise ValueError("strict needs frozen: without it a step trains all components up to its rank")
        return value

    @property
    def weights(self) -> dict[int, float]:
        """Rank → how often it is drawn, as a share; the ranks that are trained, rising."""
        ranks = _listed(self.rank, self.min_rank, self.ranks)
        given = [1.0] * len(ranks) if isinstance(self.distribution, str) else self.distribution
        total = sum(given)
        return {rank: weight / total for rank, weight in zip(ranks, given, strict=True) if weight > 0}

    def scaling(self, rank: int) -> float:
        """Factor of B·A at this rank (arXiv:2210.07558, equation 7: alpha/b)."""
        return self.alpha / (rank if self.scale_mode == "alpha_over_b" else self.rank)

    def warnings(self, known: Circumstances) -> list[str]:
        shares = self.weights
        rarest = min(shares, key=lambda rank: shares[rank])
        if known.steps is None or known.steps * shares[rarest] >= _FEW:
            return []
        drawn = f"about {known.steps * shares[rarest]:.1f} of the {known.steps} steps"
        return [f"Rank {rarest} will be drawn in {drawn}: take more steps, or fewer ranks."]


def _listed(largest: int, smallest: int, ranks: list[int] | None) -> list[int]:
    return list(range(smallest, largest + 1)) if ranks is None else ranks
