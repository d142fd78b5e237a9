"""Options of IncreLoRA. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, StrictInt

from artifacts.errors import FieldError
from artifacts.menu import Number
from train.options.common import Alpha, Circumstances, Dropout, Rank, TrainOptions
from train.rank_growth import GrowthPlan

if TYPE_CHECKING:
    from train.settings import TrainingSettings

INCREMENTS = {2: 1, 4: 2, 6: 3, 8: 4}
"""By target rank, as in the authors' recipes."""
LONGEST_GROWTH = 0.6
"""Share of the steps after which growing leaves too few to train what has grown."""
_SHARE_OF_LAYERS = 4
Beta = Annotated[Number, Field(gt=0, lt=1)]
Steps = Annotated[StrictInt, Field(ge=1, le=10_000_000)]


class IncreloraOptions(TrainOptions):
    """IncreLoRA, arXiv:2308.12043: ΔW = alpha/r·Σ λᵢ·bᵢaᵢ; the layers that matter most gain components on the way."""

    initial_rank: Rank = Field(1, description="Rank that every layer begins with.")
    target_rank: Rank = Field(
        8,
        description="Mean rank of the layers at the end: the budget is this times the number of layers (the paper has "
        "2 and 8); at most the smaller side of every adapted weight.",
    )
    total_rank: Annotated[StrictInt, Field(ge=1, le=100_000_000)] | None = Field(
        None, description="Sum of the ranks at the end, instead of target_rank times the number of layers."
    )
    increment: Rank | None = Field(
        None,
        description="Ranks that a layer gains at once, and components that it trains in advance; unset, half of a "
        "target_rank of 2, 4, 6 or 8, and needed with any other.",
    )
    layers_per_round: Annotated[StrictInt, Field(ge=1, le=100_000)] | None = Field(
        None,
        description="How many layers gain in a round, at most all (the authors: 2 to 22 of 72); unset, a quarter of "
        "them.",
    )
    interval: Steps | None = Field(
        None,
        description="Optimiser steps between two rounds; unset, training.warmup_steps, and without a warm-up as many "
        "as let the rounds take half of the training.",
    )
    wait: Annotated[StrictInt, Field(ge=0, le=10_000_000)] | None = Field(
        None, description="The first round is at the first multiple of interval above this step; unset, the interval."
    )
    beta1: Beta = Field(0.85, description="Of the running mean of a layer's score.")
    beta2: Beta = Field(0.85, description="Of the running mean of how far the score strays from that.")
    orthogonality: Annotated[Number, Field(ge=0, le=1e3)] = Field(
        0.1, description="Weight in the loss of how far A and B are from orthonormal (the authors: 0.1, or 0.3)."
    )
    reserve_weight: Annotated[Number, Field(gt=0, le=1e-3)] = Field(
        1e-5, description="λ of the components that are trained in advance; fixed until they count."
    )
    alpha: Alpha = Field(16.0, description="Numerator of the scaling, whose denominator is the rank that a layer has.")
    dropout: Dropout = Field(0.0, description="Share of the layer's inputs that the adapter does not see in a step.")
    score: Literal["gradient", "lambda"] = Field(
        "gradient",
        description="Of a layer in a step: gradient is Σ|ΔW ∘ ∂L/∂ΔW| as in the paper; lambda is |Σ λᵢ·∂L/∂λᵢ|, an "
        "approximation that costs almost nothing but lets the signs cancel.",
    )
    score_norm: Literal["root", "mean"] = Field(
        "root",
        description="The score is divided by the square root of the entries of ΔW, as in the authors' code, or by "
        "their number, as in their paper; the first favours large weights.",
    )
    score_steps: Steps | None = Field(
        None,
        description="Score only in so many steps before each round, its own included: 20 to 40 lose little, for the "
        "running means forget; unset, in every step until the budget is spent.",
    )
    on_growth: Literal["rescale", "official"] = Field(
        "rescale",
        description="A layer that gains has a larger denominator: rescale makes its λ larger so that ΔW stays; "
        "official lets ΔW shrink, as in the authors' code.",
    )
    export: Literal["padded", "patterns"] = Field(
        "padded",
        description="padded: all layers get the largest rank, with zeros, for loaders that read one rank only (vLLM, "
        "diffusers); patterns: each its own, with rank_pattern, for PEFT.",
    )

    def parameters_of(self, d_out: int, d_in: int) -> int:
        """On average, at the end: the target rank, and the components in advance, whose λ is fixed."""
        return (self.target_rank + self.step_up) * (d_out + d_in) + self.target_rank

    @property
    def step_up(self) -> int:
        """The increment in force."""
        return self.increment or INCREMENTS.get(self.target_rank, 1)

    def budget(self, layers: int) -> int:
        """The sum of the ranks at the end."""
        return self.total_rank if self.total_rank is not None else self.target_rank * layers

    def plan(self, layers: int, training: TrainingSettings, steps: int) -> GrowthPlan:
        """The rounds, for so many layers and optimiser steps."""
        per_round = self.layers_per_round or -(-layers // _SHARE_OF_LAYERS)
        budget = self.budget(layers)
        interval = self.interval or training.warmup_steps
        if not interval:
            rounds = -(-(budget - layers * self.initial_rank) // (per_round * self.step_up))
            # The first round waits for two intervals.
            interval = max(steps // (2 * (rounds + 1)), 1)
        return GrowthPlan(
            layers=layers,
            initial_rank=self.initial_rank,
            total_rank=budget,
            increment=self.step_up,
            layers_per_round=per_round,
            interval=interval,
            wait=interval if self.wait is None else self.wait,
        )

    def problems(self, known: Circumstances) -> list[FieldError]:
        found = self._budget_problems(known)
        layers = len(known.targets)
        if self.increment is None and self.target_rank not in INCREMENTS:
            usual = ", ".join(map(str, INCREMENTS))
            found.append(
                FieldError(
                    "/parameters/increment",
                    f"has to be given with a target_rank of {self.target_rank}; it is known for {usual} only",
                )
            )
        if self.layers_per_round is not None and self.layers_per_round > layers:
            found.append(
                FieldError(
                    "/parameters/layers_per_round", f"{self.layers_per_round} are more than the {layers} adapted layers"
                )
            )
        return found or self._time_problems(known)

    def warnings(self, known: Circumstances) -> list[str]:
        found = []
        if known.training.warmup_steps == 0:
            found.append(
                "Without training.warmup_steps new components begin at the full learning rate; the method was made "
                "with a warm-up for each of them."
            )
        last = None if known.steps is None else self.plan(len(known.targets), known.training, known.steps).last
        if last is not None and known.steps is not None and last > LONGEST_GROWTH * known.steps:
            share = round(100 * last / known.steps)
            found.append(f"The layers grow during {share} % of the training, which leaves little for what grows last.")
        return found

    def _budget_problems(self, known: Circumstances) -> list[FieldError]:
        layers = len(known.targets)
        budget, least = self.budget(layers), layers * self.initial_rank
        field = "target_rank" if self.total_rank is None else "total_rank"
        found = []
        if budget < least:
            found.append(
                FieldError(
                    f"/parameters/{field}",
                    f"a budget of {budget} is below {least}, what {layers} layers have that begin at rank "
                    f"{self.initial_rank}",
                )
            )
        smallest = min(known.targets, key=lambda target: min(target.d_out, target.d_in))
        limit = min(smallest.d_out, smallest.d_in)
        if budget > limit * layers:
            found.append(
                FieldError(
                    f"/parameters/{field}",
                    f"a mean rank of {budget / layers:g} is above {limit}, the smaller side of {smallest.path} "
                    f"({smallest.d_out}×{smallest.d_in})",
                )
            )
        return found

    def _time_problems(self, known: Circumstances) -> list[FieldError]:
        if known.steps is None:
            return []
        plan = self.plan(len(known.targets), known.training, known.steps)
        warmup = known.training.warmup_steps
        if plan.last is None or plan.last + warmup < known.steps:
            return []
        after = f" and its warm-up of {warmup} steps" if warmup else ""
        return [
            FieldError(
                "/parameters/interval",
                f"the last of {plan.rounds} rounds would be at step {plan.last}{after}, beyond the training of "
                f"{known.steps} steps: take a shorter interval, more layers_per_round or a larger increment",
            )
        ]
