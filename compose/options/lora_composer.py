"""Options of LoRA-Composer. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt

from artifacts.errors import FieldError
from artifacts.menu import Number
from compose.options.common import ComposeOptions, PromptText, Share, count_problems, placed
from compose.options.masks import Step
from compose.options.places import Box
from compose.prompts import ScenePrompts
from compose.request import CompositionRequest

Weight = Annotated[Number, Field(ge=0, le=1000)]


class LoraComposerOptions(ComposeOptions):
    """LoRA-Composer, arXiv:2403.11627: in one pass, each concept's box reads words of its own through its own adapter
    and does not see the other boxes; the latent is moved until attention fills the boxes.

    Losses, their weights and the re-initialisation are those of the authors' code. Different here: a cell is in a box
    when its centre is, plain LoRAs take the place of ED-LoRAs with their embeddings, poses and sketches do not steer,
    and a cell of two boxes sees both of them."""

    boxes: list[Box] | None = Field(
        None,
        description="Needed: for each concept, in their order, {left, top, right, bottom} in fractions of the image's "
        "sides.",
    )
    region_prompts: list[PromptText] | None = Field(
        None,
        description="What each box reads, with its concept's trigger and noun; unset, the scene with its own trigger "
        "only.",
    )
    adapted_layers: Literal["words", "all"] = Field(
        "all",
        description="Where a concept's adapter acts in its box: all is every layer that it has; words are keys, values "
        "and outputs of cross-attention only, as in the authors' code, whose ED-LoRAs hold most in their embeddings.",
    )
    isolate: StrictBool = Field(True, description="Keep the boxes from seeing each other in self-attention.")
    reinitialise: StrictBool = Field(
        True,
        description="Begin with the noise of the window that attends to a concept's words most put into its box.",
    )
    latent_update: StrictBool = Field(True, description="Move the latent by the losses below.")
    step_size: Weight = Field(20.0, description="η of z ← z − η·∂L/∂z, times √ of a line from 1 to 0.5 over the steps.")
    max_iter_to_alter: Step | None = Field(
        None, description="First step without an update; unset, half of the steps (the authors' code: 26 of 50)."
    )
    stop_after: Step = Field(
        5, description="From this step on, updates end once the loss has risen from one step to the next."
    )
    top_k: Share = Field(0.2, description="Share of a box's cells whose largest attention counts.")
    foreground_weight: Weight = Field(8.0, description="Of the loss that wants attention in the middle of the box.")
    fill_weight: Weight = Field(2.0, description="Of the loss that wants attention along both sides of the box.")
    background_weight: Weight = Field(
        10.0, description="Of the loss that keeps places in the box from attending to places outside."
    )
    use_text_encoder_lora: StrictBool = Field(
        True, description="Use each concept's adapter in the text encoder for its own box's words as well."
    )
    map_grid: Annotated[StrictInt, Field(ge=1, le=64)] | None = Field(
        None, description="Which attention maps are taken, as for clora: unset, 16×16 for Stable Diffusion 1.5."
    )

    def last_update(self, steps: int) -> int:
        """The first step without an update."""
        return steps // 2 if self.max_iter_to_alter is None else self.max_iter_to_alter

    def told(self, request: CompositionRequest, prompts: ScenePrompts) -> list[tuple[str, str]]:
        found = [(prompts.plain, "/prompt"), (request.negative_prompt, "/negative_prompt")]
        return [*found, *placed(self.region_prompts, "region_prompts", prompts.single)]

    def problems(self, request: CompositionRequest) -> list[FieldError]:
        found = []
        if self.boxes is None:
            found.append(FieldError("/parameters/boxes", "is needed: one box for each concept"))
        for name in ("boxes", "region_prompts"):
            found += count_problems(
                f"/parameters/{name}", getattr(self, name), len(request.concepts), "one for each concept"
            )
        for index, box in enumerate(self.boxes or ()):
            found += box.problems(f"/parameters/boxes/{index}")
        last = self.last_update(request.steps)
        if last > request.steps:
            message = f"{last} is above the number of steps, {request.steps}"
            found.append(FieldError("/parameters/max_iter_to_alter", message))
        return found
