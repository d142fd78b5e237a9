"""Options of methods that fuse adapters into one. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictInt

from artifacts.errors import FieldError
from artifacts.menu import Number
from compose.options.common import MAX_CONCEPTS, ComposeOptions, PromptText, count_problems, placed
from compose.prompts import ScenePrompts
from compose.request import CompositionRequest


class FusionOptions(ComposeOptions):
    """What every method takes that yields an adapter. Its samples are pictures that the adapters make themselves."""

    samples: Annotated[StrictInt, Field(ge=1, le=64)] = Field(
        4, description="Pictures that each adapter samples alone, to learn from; the request's steps are for each."
    )
    text_encoder: Literal["refuse", "drop"] = Field(
        "refuse",
        description="Adapters with a part in a text encoder are refused, or drop leaves that part out: what comes out "
        "is for the UNet.",
    )


class ZipLoraOptions(FusionOptions):
    """ZipLoRA, arXiv:2311.13600: one concept and one style become one LoRA, ΔW = ΔW_c·diag(m_c) + ΔW_s·diag(m_s). The
    vectors m start at 1 and learn to keep what either adapter predicts alone, while those of one layer are kept from
    acting on the same columns.

    The paper learns from the adapters' training pictures, here the adapters sample pictures of their own; convolutions
    have one m for each input channel. The result is a plain LoRA of both ranks together, exactly."""

    train_steps: Annotated[StrictInt, Field(ge=1, le=10_000)] = Field(100, description="Steps of Adam.")
    learning_rate: Annotated[Number, Field(ge=0, le=1)] = Field(0.01, description="Of Adam, constant.")
    similarity_weight: Annotated[Number, Field(ge=0, le=1000)] = Field(
        0.01, description="λ of the sum over layers of mean|m_c·m_s| (a public port: 0.01)."
    )
    style_prompt: PromptText | None = Field(
        None, description="The prompt that the style's adapter knows; unset, the request's own without the trigger."
    )

    def told(self, request: CompositionRequest, prompts: ScenePrompts) -> list[tuple[str, str]]:
        style = prompts.plain if self.style_prompt is None else self.style_prompt
        where = "/prompt" if self.style_prompt is None else "/parameters/style_prompt"
        return [*super().told(request, prompts), (style, where)]

    def problems(self, request: CompositionRequest) -> list[FieldError]:
        if len(request.styles) == 1:
            return []
        return [FieldError("/styles", f"ziplora takes one concept and one style, not {len(request.styles)} styles")]


class GradientFusionOptions(FusionOptions):
    """Gradient fusion of Mix-of-Show, arXiv:2305.18292: in each layer the W that does to every concept's activations
    what that concept's adapter does, W* = argmin Σᵢ ‖(W₀ + ΔWᵢ)·Xᵢ − W·Xᵢ‖².

    W* − W₀ = Σ BᵢAᵢCᵢ·(ΣCᵢ + λI)⁻¹ has no more than the adapters' ranks together, so that a LoRA of that rank holds it
    exactly; of a smaller one, a truncated SVD, the report tells the error. The paper also fuses token embeddings and
    text encoders, and samples with boxes: not done here."""

    solver: Literal["closed_form", "lbfgs"] = Field(
        "closed_form",
        description="closed_form solves (Σ ΔWᵢCᵢ)(ΣCᵢ + λI)⁻¹ with Cᵢ = XᵢXᵢᵀ; lbfgs goes down from W₀ as the authors "
        "do, with a history of 25 and strong Wolfe conditions.",
    )
    ridge: Annotated[Number, Field(ge=1e-10, le=1)] = Field(
        1e-6, description="λ of closed_form as a share of the mean of the diagonal of ΣCᵢ."
    )
    word_iterations: Annotated[StrictInt, Field(ge=1, le=10_000)] = Field(
        500, description="Of lbfgs, in keys and values of cross-attention (the authors' code: 500)."
    )
    place_iterations: Annotated[StrictInt, Field(ge=1, le=10_000)] = Field(
        50, description="Of lbfgs, in all other layers (the authors' code: 50)."
    )
    rank: Annotated[StrictInt, Field(ge=1, le=4096)] | None = Field(
        None, description="Of the result; unset, the adapters' ranks together, with which nothing is lost."
    )
    concept_prompts: Annotated[list[PromptText], Field(max_length=MAX_CONCEPTS)] | None = Field(
        None, description="A prompt for each concept's samples; unset, the scene with its own trigger only."
    )

    @property
    def minimum_concepts(self) -> int:
        return 2

    def told(self, request: CompositionRequest, prompts: ScenePrompts) -> list[tuple[str, str]]:
        words = placed(self.concept_prompts, "concept_prompts", prompts.single)
        return [*words, (request.negative_prompt, "/negative_prompt")]

    def problems(self, request: CompositionRequest) -> list[FieldError]:
        return count_problems(
            "/parameters/concept_prompts", self.concept_prompts, len(request.concepts), "one for each concept"
        )
