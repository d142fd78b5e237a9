"""Black Forest Labs' own names with no prefix: `double_blocks.0.img_attn.qkv.lora_A.weight`."""

from __future__ import annotations

from artifacts.formats.protocol import Place

_STARTS = (
    *("double_blocks.", "single_blocks.", "img_in.", "txt_in."),
    *("time_in.", "vector_in.", "guidance_in.", "final_layer."),
)
_WHOLE = ("img_in", "txt_in")


class BlackForestLabs:
    """The first implementation's names, as FLUX tools and OneTrainer's "original" export write them."""

    name = "bfl"
    description = "a FLUX LoRA with Black Forest Labs names"

    def place(self, stem: str, role: str) -> Place | None:
        if stem.startswith(_STARTS) or stem in _WHOLE:
            return Place("transformer", stem, kept=f"diffusion_model.{stem}")
        return None
