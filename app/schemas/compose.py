"""The body of POST /compose-image, and the parameters of a compose job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints

from app.dependencies import HEX_ID, PLAIN
from app.schemas.common import BaseModelName, Name, RequestModel
from app.schemas.resources import Resources
from artifacts.menu import Number
from compose.catalog import METHODS
from compose.options.common import MAX_CONCEPTS, MAX_STEPS, MAX_STYLE_WEIGHT, PromptText
from compose.request import DEFAULT_STEPS, CompositionRequest, Concept, Style
from compose.validation import MAX_SIDE, MAX_WEIGHT

MAX_STYLES = 8
MAX_COMPARED = 12
MAX_SEED = 2**53 - 1
"""What every JSON client carries exactly."""
AdapterId = Annotated[str, StringConstraints(pattern=f"^adp_{HEX_ID}$")]
Word = Annotated[str, StringConstraints(max_length=100, pattern=PLAIN)]
Side = Annotated[int, Field(strict=True, ge=1, le=MAX_SIDE)]
ConceptWeight = Annotated[Number, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)]
StyleWeight = Annotated[Number, Field(ge=0, le=MAX_STYLE_WEIGHT)]

_EXAMPLE: dict[str, Any] = {
    "base_model": "mdl_" + "0" * 32,
    "concepts": [
        {"adapter": "adp_" + "0" * 32, "trigger": "sks", "noun": "cat"},
        {"adapter": "adp_" + "1" * 32, "trigger": "zwx", "noun": "dog"},
    ],
    "prompt": "a cat and a dog in the park",
}


class ComposeConcept(RequestModel):
    """One thing that shall appear, and the adapter that knows it."""

    adapter: AdapterId
    trigger: Word = Field("", description="Word that the adapter was trained with, such as sks; may be empty.")
    noun: Annotated[Word, StringConstraints(min_length=1)] = Field(
        description="What it is, as a word of the prompt, such as dog."
    )
    weight: ConceptWeight = Field(1.0, description="Factor on the adapter.")


class ComposeStyle(RequestModel):
    """An adapter that acts on the whole image."""

    adapter: AdapterId
    weight: StyleWeight = 1.0


class ComposeScene(RequestModel):
    """What the image shall show."""

    base_model: BaseModelName = Field(description="Id (mdl_…) or name of a registered diffusers pipeline.")
    concepts: list[ComposeConcept] = Field(min_length=1, max_length=MAX_CONCEPTS)
    styles: list[ComposeStyle] = Field(default_factory=list, max_length=MAX_STYLES)
    prompt: Annotated[PromptText, StringConstraints(min_length=1)] = Field(
        description="The scene with every concept's noun; triggers may stand before their nouns or be left out."
    )
    negative_prompt: PromptText = ""
    seed: Annotated[int, Field(strict=True, ge=-MAX_SEED, le=MAX_SEED)] = 0
    width: Side | None = Field(None, description="Pixels; unset, the base model's own.")
    height: Side | None = Field(None, description="Pixels; unset, the base model's own.")
    steps: Annotated[int, Field(strict=True, ge=1, le=MAX_STEPS)] = Field(DEFAULT_STEPS, description="Of the sampler.")
    precision: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="auto: float16 on a GPU, float32 on a CPU."
    )
    preview_every: Annotated[int, Field(strict=True, ge=1, le=MAX_STEPS)] | None = Field(
        None,
        description="Steps between `preview` events; each costs a pass of the decoder. Unset: none.",
    )

    def scene(self, method: str, parameters: dict[str, Any]) -> CompositionRequest:
        """As the room takes it, with ids in the place of folders."""
        return CompositionRequest(
            base=Path(self.base_model),
            concepts=tuple(
                Concept(Path(item.adapter), item.adapter, item.trigger, item.noun, item.weight)
                for item in self.concepts
            ),
            styles=tuple(Style(Path(item.adapter), item.adapter, item.weight) for item in self.styles),
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            method=method,
            parameters=parameters,
            seed=self.seed,
            width=self.width,
            height=self.height,
            steps=self.steps,
        )


class ComposeParams(ComposeScene):
    """Compose one image of several adapters; by methods that yield an adapter, one adapter of them."""

    method: str = Field("clora", description="See GET /methods.", json_schema_extra={"enum": list(METHODS)})
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="Options of the method; GET /methods/compose/{method} has their JSON Schema."
    )
    name: Name | None = Field(None, description="Of the image, or of the adapter if the method yields one.")


class CompareMethod(RequestModel):
    """One of the methods that are compared."""

    method: str = Field(description="See GET /methods.", json_schema_extra={"enum": list(METHODS)})
    parameters: dict[str, Any] = Field(default_factory=dict, description="As of POST /compose-image.")
    label: Annotated[Name, StringConstraints(max_length=80)] | None = Field(
        None, description="What the image is called on the sheet; unset, as its method."
    )


class CompareParams(ComposeScene):
    """Compose one scene by several methods, all from the same noise."""

    methods: list[CompareMethod] = Field(min_length=2, max_length=MAX_COMPARED)


class ComposeRequest(ComposeParams):
    """An image, and what may be asked of the machine that makes it."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                **_EXAMPLE,
                "method": "clora",
                "seed": 7,
                "steps": 50,
            }
        }
    )

    resources: Resources | None = None


class CompareRequest(CompareParams):
    """A comparison, and what may be asked of the machine that does it."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                **_EXAMPLE,
                "methods": [{"method": "merge"}, {"method": "clora"}],
            }
        }
    )

    resources: Resources | None = None
