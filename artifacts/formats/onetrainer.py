"""OneTrainer's own format: as kohya's, but `lora_transformer_` before flattened names of diffusers."""

from __future__ import annotations

from artifacts.formats.protocol import Place


class OneTrainer:
    """The transformer's modules; the text encoders of such a file carry kohya's names."""

    name = "onetrainer"
    description = "a OneTrainer LoRA"

    def place(self, stem: str, role: str) -> Place | None:
        if stem.startswith("lora_transformer_"):
            return Place("transformer", stem.removeprefix("lora_transformer_"), flat=True)
        return None
