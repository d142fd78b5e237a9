"""XLabs' FLUX LoRAs: fused projections inside processors, `double_blocks.0.processor.qkv_lora1.down.weight`."""

from __future__ import annotations

import re

from artifacts.formats.protocol import Place

_LAYER = re.compile(r"(?:diffusion_model\.)?(double_blocks|single_blocks)\.\d+\.processor\.(?:qkv|proj)_lora[12]?")


class XLabs:
    """1 is the image's stream and 2 the text's; a single block has one of each."""

    name = "xlabs"
    description = "an XLabs FLUX LoRA"

    def place(self, stem: str, role: str) -> Place | None:
        if ".processor." not in stem or _LAYER.fullmatch(stem) is None:
            return None
        path = stem.removeprefix("diffusion_model.")
        return Place("transformer", path, kept=f"diffusion_model.{path}")
