"""Names with no prefix at all, as a model's own state dict has them: `transformer_blocks.0.attn.to_q.lora_A.weight`."""

from __future__ import annotations

from artifacts.formats.protocol import DENOISER, Place
from artifacts.formats.roles import WEAK


class Bare:
    """Any dotted name; only a stored architecture that has such a module makes it the name of one."""

    name = "bare"
    description = "a LoRA file without PEFT's prefix"

    def place(self, stem: str, role: str) -> Place | None:
        if role in WEAK and role != "alpha":
            return None
        return Place(DENOISER, stem)
