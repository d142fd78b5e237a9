"""The first LoRAs of diffusers: layers inside attention processors, `….attn1.processor.to_q_lora.down.weight`.

The UNet's names come with or without `unet.`; a text encoder's are `….self_attn.to_out_lora.up.weight`.
"""

from __future__ import annotations

from artifacts.formats.protocol import Place

_UNET = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
_ADDED = {"add_k_proj": "add_k_proj", "add_v_proj": "add_v_proj"}
_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class AttentionProcessors:
    """Layers that were named for the processor that held them."""

    name = "attention-processors"
    description = "an old diffusers attention-processor LoRA"

    def place(self, stem: str, role: str) -> Place | None:
        if not stem.endswith("_lora"):
            return None
        attention, _, layer = stem.removesuffix("_lora").rpartition(".")
        if attention.endswith(".processor"):
            target = (_UNET | _ADDED).get(layer)
            if target is None or "motion_modules." in attention:
                return None
            path = f"{attention.removesuffix('.processor').removeprefix('unet.')}.{target}"
            return Place("unet", path, kept=f"unet.{path}")
        component, _, rest = attention.partition(".")
        if component.startswith("text_encoder") and attention.endswith(".self_attn") and layer in _TEXT:
            return Place(component, f"{rest}.{_TEXT[layer]}", kept=f"{attention}.{_TEXT[layer]}")
        return None
