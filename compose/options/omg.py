"""Options of OMG. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, StrictBool

from artifacts.errors import FieldError
from compose.options.common import ComposeOptions, PromptText, Share, count_problems, placed
from compose.options.masks import Step
from compose.options.places import Place
from compose.prompts import ScenePrompts
from compose.request import CompositionRequest


class OmgOptions(ComposeOptions):
    """OMG, arXiv:2403.10983, with masks of the user's: the base model makes the scene, and each concept's adapter has
    its say in the noise inside its own mask.

    The authors find the masks with a detector and a segmenter on the base model's picture; here they are given."""

    stage: Literal["compose", "base"] = Field(
        "compose",
        description="base makes the base model's own picture of this seed, on which masks are drawn; compose makes the "
        "picture with all concepts.",
    )
    places: list[Place] | None = Field(
        None,
        description="For each concept, in their order, where it is: {boxes: [{left, top, right, bottom}, …]} in "
        "fractions of the image's sides, or {png: …}, a small PNG in base64 that is white there.",
    )
    rho: Share = Field(
        1.0,
        description="ρ: inside a mask the noise is (1 − ρ)·ε_base + ρ·ε_concept; 0 is the base model alone.",
    )
    region_prompts: list[PromptText] | None = Field(
        None, description="A prompt for each concept's adapter; unset, the scene with its own trigger only."
    )
    base_steps: Step = Field(0, description="First steps in which the base model is alone; at most the steps.")
    use_text_encoder_lora: StrictBool = Field(
        True, description="Use each concept's adapter in the text encoder for its own prompt as well."
    )
    batch_branches: Literal["auto", "never"] = Field(
        "auto",
        description="Run base and concepts in one pass of the UNet where each has one adapter at most; never runs them "
        "one after another, which takes less memory.",
    )

    def told(self, request: CompositionRequest, prompts: ScenePrompts) -> list[tuple[str, str]]:
        found = [(prompts.plain, "/prompt"), (request.negative_prompt, "/negative_prompt")]
        return (
            found if self.stage == "base" else [*found, *placed(self.region_prompts, "region_prompts", prompts.single)]
        )

    def problems(self, request: CompositionRequest) -> list[FieldError]:
        found = []
        if self.places is None and self.stage == "compose":
            message = "is needed: draw masks on the picture that stage 'base' makes, or give boxes"
            found.append(FieldError("/parameters/places", message))
        for name in ("places", "region_prompts"):
            found += count_problems(
                f"/parameters/{name}", getattr(self, name), len(request.concepts), "one for each concept"
            )
        for index, place in enumerate(self.places or ()):
            found += place.problems(f"/parameters/places/{index}")
        if self.base_steps > request.steps:
            message = f"{self.base_steps} is above the number of steps, {request.steps}"
            found.append(FieldError("/parameters/base_steps", message))
        return found
