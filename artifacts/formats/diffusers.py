"""diffusers: `<component>.<path>` before PEFT's `lora_A`, or the older `lora.down` and `lora_linear_layer.down`."""

from __future__ import annotations

from artifacts.formats.protocol import Place

COMPONENTS = frozenset(
    {
        "unet",
        "transformer",
        "transformer_2",
        "prior",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "connectors",
        "text_conditioner",
        "controlnet",
    }
)


class Diffusers:
    """Dotted names below the name of a pipeline's component."""

    name = "diffusers"
    description = "a diffusers LoRA"

    def place(self, stem: str, role: str) -> Place | None:
        component, dot, rest = stem.partition(".")
        if not dot or component not in COMPONENTS:
            return None
        if component == "transformer" and rest.startswith(("h.", "encoder.layers.")):
            return None  # "transformer.h.0" is GPT-2, "transformer.encoder.layers.0" is ChatGLM
        return Place(component, rest, kept=stem)
