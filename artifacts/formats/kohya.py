"""kohya's sd-scripts, musubi-tuner and LyCORIS: `lora_unet_<path with underscores>.lora_down.weight`."""

from __future__ import annotations

from artifacts.formats.protocol import DENOISER, Place

_PREFIXES = (
    ("lora_unet_", DENOISER),
    ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
    ("lycoris_", DENOISER),
    ("oft_unet_", DENOISER),
    ("oft_te_", "text_encoder"),
    ("lora_prior_unet_", "prior"),
)


class Kohya:
    """Flattened names below a prefix that tells the part of the pipeline."""

    name = "kohya"
    description = "a kohya sd-scripts LoRA"

    def place(self, stem: str, role: str) -> Place | None:
        for prefix, component in _PREFIXES:
            if stem.startswith(prefix):
                return Place(component, stem[len(prefix) :], flat=True)
        return None
