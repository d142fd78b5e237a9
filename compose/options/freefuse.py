"""Options of masked outputs. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt

from artifacts.errors import FieldError
from compose.options.common import MAX_STEPS
from compose.options.masks import MaskOptions
from compose.request import CompositionRequest


class FreefuseOptions(MaskOptions):
    """Masked outputs in the way of FreeFuse, arXiv:2510.23515: in one pass, each adapter's output counts only inside
    its concept's mask.

    Masks are made as CLoRA makes them. The authors' code has more, which is not done here: corrections of attention
    sinks, an even sharing out of cells, a bias on attention, and tokens of other concepts that are set to zero; instead
    each place reads words through its own adapters only."""

    mask_steps: Annotated[StrictInt, Field(ge=1, le=MAX_STEPS)] = Field(
        5, description="First steps whose attention maps are averaged into masks; below the number of steps."
    )
    restart: StrictBool = Field(
        True,
        description="Begin again from the noise once masks are there, as the authors do; false goes on from the step "
        "that is reached.",
    )
    masks_from: Literal["adapters", "base"] = Field(
        "base",
        description="What runs while masks are made: the base model alone, as the authors' code recommends for SDXL, "
        "or all adapters at once, as merge has them. On ShapesSD the base's masks part concepts better.",
    )
    disjoint: StrictBool = Field(
        True, description="A cell in several masks stays with the concept that attends to it most."
    )
    use_text_encoder_lora: StrictBool = Field(
        True,
        description="Use the concepts' adapters in the text encoder as well; each region reads words that its own "
        "adapters encoded.",
    )

    @property
    def minimum_concepts(self) -> int:
        return 2

    def problems(self, request: CompositionRequest) -> list[FieldError]:
        if self.mask_steps < request.steps:
            return []
        return [
            FieldError(
                "/parameters/mask_steps",
                f"{self.mask_steps} is not below the number of steps, {request.steps}, so that no step had masks",
            )
        ]
