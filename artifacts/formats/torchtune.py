"""torchtune's own names: `layers.0.attn.q_proj.lora_a.weight`.

For Llama and Mistral its queries and keys have the two rows of every rotated pair side by side, for Qwen2 they stand as
transformers has them. The tensors tell neither that nor alpha.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from artifacts.errors import ConfigRefused
from artifacts.formats.protocol import LANGUAGE_MODEL, Place, Settings
from artifacts.formats.roles import MAGNITUDE, A, B
from artifacts.formats.settings import head_rows, number, whole

_STEM = re.compile(r"(layers\.\d+)\.(attn\.(?:q_proj|k_proj|v_proj|output_proj)|mlp\.w[123])")
_NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_INTERLEAVED, _AS_TRANSFORMERS = ("llama", "mistral"), ("qwen2",)
_WHERE = "adapter_config.json: "
_HINT = (
    "adapter_config.json needs r and lora_alpha of the recipe, and model_type and head_dim of the base model's "
    "config.json (head_dim is hidden_size / num_attention_heads where it does not stand there)."
)


class TorchTune:
    """`layers.0.attn.q_proj.lora_a.weight`, torchtune's own names, beside an adapter_config.json"""

    name = "torchtune"
    description = "a torchtune LoRA"
    settings_name = "adapter_config.json"

    def place(self, stem: str, role: str) -> Place | None:
        found = _STEM.fullmatch(stem) if role in (A, B, MAGNITUDE) else None
        if found is None:
            return None
        path = f"model.{found[1]}.{_NAMES[found[2]]}"
        return Place(LANGUAGE_MODEL, path, kept=path, interleaved=found[2] in ("attn.q_proj", "attn.k_proj"))

    def settings(self, document: Mapping[str, Any]) -> Settings:
        """`r` and `lora_alpha` as PEFT means them; `model_type` and `head_dim` as transformers means them."""
        family = document.get("model_type")
        if family not in (*_INTERLEAVED, *_AS_TRANSFORMERS):
            raise ConfigRefused(
                f"{_WHERE}model_type is {str(family)[:40]}; torchtune's layers are read here of "
                f"{', '.join((*_INTERLEAVED, *_AS_TRANSFORMERS))}.",
                hint=_HINT,
            )
        rows = head_rows(document, _WHERE, hint=_HINT) if family in _INTERLEAVED else 0
        alpha = number(document, "lora_alpha", _WHERE, hint=_HINT)
        return Settings(alpha=alpha, rank=whole(document, "r", _WHERE, hint=_HINT), head_rows=rows)
