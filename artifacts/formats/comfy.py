"""ComfyUI and ai-toolkit: `diffusion_model.<path in the model's first implementation>`."""

from __future__ import annotations

from artifacts.formats.protocol import DENOISER, Place

_PREFIXES = ("diffusion_model.", "model.diffusion_model.")
_ENCODERS = {"text_encoders.clip_l.": "text_encoder", "text_encoders.clip_g.": "text_encoder_2"}


class Comfy:
    """Dotted names of the first implementation, or of diffusers."""

    name = "comfy"
    description = "a ComfyUI or ai-toolkit LoRA"

    def place(self, stem: str, role: str) -> Place | None:
        for prefix in _PREFIXES:
            if stem.startswith(prefix):
                rest = stem[len(prefix) :]
                return Place(DENOISER, rest, kept=f"diffusion_model.{rest}")
        for prefix, component in _ENCODERS.items():
            if stem.startswith(prefix):
                rest = stem[len(prefix) :].removeprefix("transformer.")
                return Place(component, rest, kept=f"{component}.{rest}")
        return None
