"""Options of K-LoRA. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StrictBool, StrictInt

from artifacts.errors import FieldError
from artifacts.menu import Number
from compose.options.common import ComposeOptions
from compose.request import CompositionRequest

Factor = Annotated[Number, Field(ge=0, le=1000)]


class KLoraOptions(ComposeOptions):
    """K-LoRA, arXiv:2502.18461: one concept and one style; in each layer and step one of their adapters acts alone.

    Content acts in step i of T where S_c/γ > S_s·(α·i/T + β), with S the sum of a layer's K largest |ΔW| and γ the mean
    over layers of Σ|ΔW_c| / Σ|ΔW_s|."""

    top_k: Annotated[StrictInt, Field(ge=1, le=2**20)] | None = Field(
        None,
        description="K, the largest entries of |ΔW| that a layer's score sums; unset, the product of both ranks in "
        "that layer (arXiv:2502.18461).",
    )
    alpha: Factor = Field(1.5, description="α, how much the style gains over the steps (arXiv:2502.18461: 1.5).")
    beta: Factor = Field(0.5, description="β, what the style's score counts in the first step (arXiv:2502.18461: 0.5).")
    use_text_encoder_lora: StrictBool = Field(
        True, description="Use both adapters in the text encoder as well, where they act together."
    )

    def problems(self, request: CompositionRequest) -> list[FieldError]:
        if len(request.styles) == 1:
            return []
        return [FieldError("/styles", f"k_lora takes one concept and one style, not {len(request.styles)} styles")]
