"""Options of CLoRA. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt, field_validator

from artifacts.errors import FieldError
from artifacts.menu import Number
from compose.options.common import PromptText, count_problems, placed
from compose.options.masks import MaskOptions, Step
from compose.prompts import ScenePrompts
from compose.request import CompositionRequest

PAPER_REFINEMENT = (0, 10, 20)
"""Steps whose update is repeated in the paper."""


class CloraMaskOnlyOptions(MaskOptions):
    """CLoRA without its latent update: a branch per concept, fused by masks of its cross-attention."""

    branch_prompts: list[PromptText] | None = Field(
        None,
        description="One prompt for the base branch and one for each concept, in their order; unset, they are made "
        "from the prompt by putting each trigger before its own noun only.",
    )
    branch_negative_prompts: list[PromptText] | None = Field(
        None, description="One negative prompt for each branch; unset, the request's own in all."
    )
    base_branch: StrictBool = Field(
        True, description="Have a branch of the base model alone, which fills what no concept's mask covers."
    )
    apply_mask_after: Step = Field(
        0, description="Steps in which all branches are averaged before masks are used; at most the steps."
    )
    freeze_mask_after: Step | None = Field(
        None, description="Step after whose masks they stay as they are; unset, every step makes its own."
    )
    use_text_encoder_lora: StrictBool = Field(
        False, description="Use the concepts' adapters in the text encoder as well; styles always are."
    )
    compat: Literal["paper", "official"] = Field(
        "paper",
        description="paper takes maps from the conditional half, and predictions and masks at the updated latent. "
        "official is for reproduction of the authors' code: maps averaged over both halves, predictions and masks of "
        "the forward pass before the last update.",
    )
    batch_branches: Literal["auto", "never"] = Field(
        "auto",
        description="Run all branches in one pass of the UNet where each has one adapter at most; never runs them one "
        "after another, which takes less memory.",
    )

    @property
    def minimum_concepts(self) -> int:
        return 2

    def told(self, request: CompositionRequest, prompts: ScenePrompts) -> list[tuple[str, str]]:
        words = placed(self.branch_prompts, "branch_prompts", (prompts.plain, *prompts.single))
        if self.branch_negative_prompts is None:
            return [*words, (request.negative_prompt, "/negative_prompt")]
        negatives = placed(self.branch_negative_prompts, "branch_negative_prompts", ())
        return [*words, *negatives[0 if self.base_branch else 1 :]]

    def problems(self, request: CompositionRequest) -> list[FieldError]:
        found = []
        branches, first = len(request.concepts) + 1, "the base branch and one for each concept"
        for name in ("branch_prompts", "branch_negative_prompts"):
            found += count_problems(f"/parameters/{name}", getattr(self, name), branches, first)
        for name in ("apply_mask_after", "freeze_mask_after"):
            value = getattr(self, name)
            if value is not None and value > request.steps:
                found.append(
                    FieldError(f"/parameters/{name}", f"{value} is above the number of steps, {request.steps}")
                )
        return found


class CloraOptions(CloraMaskOnlyOptions):
    """CLoRA, arXiv:2403.19776: the latent is moved until attention maps of one concept agree and those of others do
    not, and each branch's prediction counts only inside its own mask."""

    temperature: Annotated[Number, Field(gt=0, le=10)] = Field(
        0.5, description="τ of the contrastive loss (arXiv:2403.19776: 0.5)."
    )
    step_size: Annotated[Number, Field(ge=0, le=1000)] = Field(
        20.0,
        description="η of z ← z − η·∂L/∂z. The first update should move the latent by 1 to 10 % (see `updates` in the "
        "report); SDXL and small models need far less.",
    )
    step_schedule: Literal["constant", "sqrt_decay"] = Field(
        "constant",
        description="sqrt_decay multiplies η by √ of a line from 1 to 0.5 over the steps (arXiv:2312.06059).",
    )
    latent_update: StrictBool = Field(True, description="Move the latent; false is clora_mask_only.")
    max_iter_to_alter: Step | None = Field(
        None, description="First step without an update; unset, half of the steps (arXiv:2403.19776: 25 of 50)."
    )
    iterative_steps: list[Step] | None = Field(
        None,
        description="Steps whose update is repeated, each below max_iter_to_alter; unset, those of 0, 10 and 20 that "
        "are (arXiv:2403.19776).",
    )
    iterative_repeats: Annotated[StrictInt, Field(ge=0, le=100)] = Field(
        20, description="R, further updates in each of the iterative steps."
    )
    gradient_caching: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Hold the graph of one branch at a time, at the price of one more forward pass of all but one of "
        "them. auto does so in the first update, which tells how much a graph takes, and goes on with it unless the "
        "graphs of all branches take at most half of the memory that is free then. The gradient is the same.",
    )
    gradient_checkpointing: StrictBool = Field(
        False, description="Compute activations again in the backward pass: less memory, more time."
    )

    @field_validator("iterative_steps")
    @classmethod
    def _each_once(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("names a step twice")
        return value

    def last_update(self, steps: int) -> int:
        """The first step without an update."""
        return steps // 2 if self.max_iter_to_alter is None else self.max_iter_to_alter

    def refined(self, steps: int) -> tuple[int, ...]:
        """The steps whose update is repeated."""
        if self.iterative_steps is not None:
            return tuple(sorted(self.iterative_steps))
        return tuple(step for step in PAPER_REFINEMENT if step < self.last_update(steps))

    def updates_in(self, index: int, steps: int) -> int:
        """How often the latent is moved in a step."""
        if not self.latent_update or index >= self.last_update(steps):
            return 0
        return 1 + (self.iterative_repeats if index in self.refined(steps) else 0)

    def problems(self, request: CompositionRequest) -> list[FieldError]:
        found = super().problems(request)
        last = self.last_update(request.steps)
        if last > request.steps:
            found.append(
                FieldError("/parameters/max_iter_to_alter", f"{last} is above the number of steps, {request.steps}")
            )
        late = [step for step in self.iterative_steps or () if step >= last]
        if late:
            found.append(
                FieldError(
                    "/parameters/iterative_steps",
                    f"{', '.join(map(str, late))}: not below max_iter_to_alter = {last}, so that they would do nothing",
                )
            )
        return found

    def warnings(self, request: CompositionRequest) -> list[str]:
        found = super().warnings(request)
        wanted = max(PAPER_REFINEMENT) + 1
        if self.latent_update and self.iterative_steps is None and request.steps < wanted:
            found.append(
                f"With {request.steps} steps, fewer than {wanted}, not all of the paper's refinement steps "
                f"{', '.join(map(str, PAPER_REFINEMENT))} take place."
            )
        return found
