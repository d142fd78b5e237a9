"""What the options of every composition method have in common. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StringConstraints

from artifacts.errors import FieldError
from artifacts.menu import NO_NUL, Number
from compose.prompts import ScenePrompts
from compose.request import CompositionRequest

MAX_CONCEPTS = 8
MAX_STEPS = 1000
MAX_STYLE_WEIGHT = 2.0

PromptText = Annotated[str, StringConstraints(max_length=2000, pattern=NO_NUL)]
Share = Annotated[Number, Field(ge=0, le=1)]


class ComposeOptions(BaseModel):
    """What every composition method understands."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    guidance_scale: Annotated[Number, Field(ge=1, le=30)] = Field(
        7.5,
        description="g of classifier-free guidance, ε_u + g·(ε_c − ε_u). At 1 the unconditional half is not computed.",
    )
    guidance_rescale: Share = Field(
        0.0, description="φ of the rescaling against over-exposure (arXiv:2305.08891, section 3.4); 0 is none."
    )
    clip_skip: Annotated[StrictInt, Field(ge=0, le=24)] | None = Field(
        None, description="Layers left out at the text encoder's end; unset, the pipeline's own choice."
    )
    scheduler: Literal["ddim", "euler", "pipeline"] = Field(
        "ddim",
        description="Sampler, built from the pipeline's noise schedule; pipeline takes the one that the base model is "
        "stored with. Samplers of second order are refused.",
    )

    @property
    def minimum_concepts(self) -> int:
        """Concepts below which the method makes no sense."""
        return 1

    def problems(self, request: CompositionRequest) -> list[FieldError]:
        """Why the image can not be made: found when it is submitted, and again before it starts."""
        del request
        return []

    def told(self, request: CompositionRequest, prompts: ScenePrompts) -> list[tuple[str, str]]:
        """What the text encoders are given, each with its place in the request."""
        return [(prompts.full, "/prompt"), (request.negative_prompt, "/negative_prompt")]

    def warnings(self, request: CompositionRequest) -> list[str]:
        """What the user should know although it can be done: whole sentences."""
        del request
        return []


def count_problems(pointer: str, given: Sequence[object] | None, wanted: int, what: str) -> list[FieldError]:
    """A finding when a list that is given has another length than it must have."""
    if given is None or len(given) == wanted:
        return []
    return [FieldError(pointer, f"must have {wanted} entries, {what}; it has {len(given)}")]


def placed(given: Sequence[str] | None, name: str, otherwise: Sequence[str]) -> list[tuple[str, str]]:
    """The prompts of a parameter, each with its place; where it is not given, others that are made of /prompt."""
    if given is None:
        return [(text, "/prompt") for text in otherwise]
    return [(text, f"/parameters/{name}/{index}") for index, text in enumerate(given)]
