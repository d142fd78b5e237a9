"""Motion LoRAs of AnimateDiff: processors' names below `temporal_transformer`, which diffusers does not have."""

from __future__ import annotations

from artifacts.formats.protocol import Place


class AnimateDiff:
    """`down_blocks.0.motion_modules.0.temporal_transformer.….attention_blocks.0.processor.to_q_lora`."""

    name = "animatediff"
    description = "an AnimateDiff motion LoRA"

    def place(self, stem: str, role: str) -> Place | None:
        if ".motion_modules." not in stem or (stem.startswith("unet.") and ".processor." not in stem):
            return None  # below a component and without processors the names are diffusers' own
        path = stem.removeprefix("unet.").removesuffix("_lora").replace(".processor.", ".")
        if path.endswith(".to_out"):
            path = f"{path}.0"
        return Place("unet", path, kept=f"unet.{path}")
