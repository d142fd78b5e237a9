"""Options of methods that make masks of cross-attention. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StrictBool, StrictInt

from artifacts.menu import Number
from compose.options.common import MAX_STEPS, ComposeOptions

Step = Annotated[StrictInt, Field(ge=0, le=MAX_STEPS)]


class MaskOptions(ComposeOptions):
    """How attention becomes masks."""

    mask_threshold: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.3,
        description="α: a cell belongs to a token's mask when its attention is above α times the token's largest "
        "(the authors' code of CLoRA 0.3, their example 0.4).",
    )
    mask_dilate: StrictBool = Field(False, description="Widen masks by one cell (3×3).")
    mask_erode: StrictBool = Field(False, description="Then narrow them by one cell.")
    mask_opening: StrictBool = Field(False, description="Then remove specks: narrow and widen.")
    mask_closing: StrictBool = Field(False, description="Then fill holes: widen and narrow.")
    map_grid: Annotated[StrictInt, Field(ge=1, le=64)] | None = Field(
        None,
        description="Side of a latent pixel square that is one cell of the attention maps: the factor by which a "
        "cross-attention layer's grid is coarser than the latent. Unset, the coarsest with at least 16 cells a "
        "side at the model's native size: 4 for Stable Diffusion 1.5 and SDXL.",
    )

    @property
    def refines_masks(self) -> bool:
        """Whether masks are widened, narrowed or filled."""
        return self.mask_dilate or self.mask_erode or self.mask_opening or self.mask_closing
