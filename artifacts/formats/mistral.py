"""Mistral's own names (mistral-finetune, mistral-inference): `layers.0.attention.wq.lora_A.weight`.

Queries and keys have the two rows of every rotated pair side by side, as Meta's first implementation has them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from artifacts.errors import ConfigRefused
from artifacts.formats.protocol import LANGUAGE_MODEL, Place, Settings
from artifacts.formats.settings import head_rows, number, whole

_STEM = re.compile(r"(layers\.\d+)\.(attention\.w[qkvo]|feed_forward\.w[123])")
_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


class Mistral:
    """`layers.0.attention.wq.lora_A.weight` beside a params.json, as mistral-finetune writes them."""

    name = "mistral"
    description = "a LoRA with Mistral's own names"
    settings_name = "params.json"

    def place(self, stem: str, role: str) -> Place | None:
        found = _STEM.fullmatch(stem)
        if found is None:
            return None
        path = f"model.{found[1]}.{_NAMES[found[2]]}"
        return Place(LANGUAGE_MODEL, path, kept=path, interleaved=found[2] in ("attention.wq", "attention.wk"))

    def settings(self, document: Mapping[str, Any]) -> Settings:
        """`lora.scaling` multiplies the product, whatever the rank; `head_dim` is of the model."""
        lora = document.get("lora")
        if not isinstance(lora, dict):
            raise ConfigRefused(
                "params.json has no lora.",
                hint="mistral-finetune writes it with the rank and the scaling that it trained with, 2 unless set.",
            )
        return Settings(
            scaling=number(lora, "scaling", "params.json: lora."),
            rank=whole(lora, "rank", "params.json: lora."),
            head_rows=head_rows(document, "params.json: "),
        )
