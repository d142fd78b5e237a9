"""Options of the plain methods: the weighted sum, one adapter at a time, the mean of the predictions. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictInt

from compose.options.common import MAX_STEPS, ComposeOptions


class MergeOptions(ComposeOptions):
    """The exact weighted sum W + Σ wᵢ·sᵢ·BᵢAᵢ, under one prompt with all triggers."""


class SwitchOptions(ComposeOptions):
    """LoRA-Switch, arXiv:2402.16843: exactly one adapter in each step, in turn."""

    switch_steps: Annotated[StrictInt, Field(ge=1, le=MAX_STEPS)] = Field(
        5, description="τ, steps before the next adapter takes over (arXiv:2402.16843: 5)."
    )
    compat: Literal["paper", "official"] = Field(
        "paper",
        description="official keeps the first adapter for τ + 1 steps, as the authors' code does; paper takes "
        "adapter ⌊i/τ⌋ mod k in step i.",
    )

    @property
    def minimum_concepts(self) -> int:
        return 2


class CompositeOptions(ComposeOptions):
    """LoRA-Composite, arXiv:2402.16843: the mean of the adapters' predictions, under one prompt."""

    @property
    def minimum_concepts(self) -> int:
        return 2
