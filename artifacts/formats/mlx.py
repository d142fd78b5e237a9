"""Apple's MLX (mlx-lm): `model.layers.0.self_attn.q_proj.lora_a`, transposed; the scaling is in a file beside it.

A layer adds scale·(x·lora_a)·lora_b, with lora_a: (d_in, r) and lora_b: (r, d_out). Its names of modules are
transformers' own wherever they begin with `model.layers.`; others are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from artifacts.errors import ConfigRefused
from artifacts.formats.protocol import LANGUAGE_MODEL, Place, Settings
from artifacts.formats.roles import A_T, B_T, MAGNITUDE
from artifacts.formats.settings import number, whole

_WHERE = "adapter_config.json: lora_parameters."
_HINT = "mlx-lm writes adapter_config.json beside adapters.safetensors; send both."


class MLX:
    """`model.layers.0.self_attn.q_proj.lora_a` beside an adapter_config.json, as mlx-lm writes them."""

    name = "mlx"
    description = "an MLX LoRA"
    settings_name = "adapter_config.json"

    def place(self, stem: str, role: str) -> Place | None:
        if role not in (A_T, B_T, MAGNITUDE):
            return None
        if stem == "lm_head" or stem.startswith("model.layers."):
            return Place(LANGUAGE_MODEL, stem, kept=stem)
        return None

    def settings(self, document: Mapping[str, Any]) -> Settings:
        """`lora_parameters`: `scale` multiplies the product, whatever the rank.

        Releases of 2024 multiplied it by `alpha`/rank as well where there is an `alpha`; later ones ignore that field.
        """
        parameters = document.get("lora_parameters")
        if not isinstance(parameters, dict):
            raise ConfigRefused("adapter_config.json has no lora_parameters.", hint=_HINT)
        if "alpha" in parameters:
            raise ConfigRefused(
                "adapter_config.json: lora_parameters.alpha is ambiguous: old releases of mlx-lm scale by "
                "scale·alpha/rank, later ones by scale alone.",
                hint="Remove alpha, and set scale to what the product is to be multiplied by.",
            )
        return Settings(
            scaling=number(parameters, "scale", _WHERE, hint=_HINT), rank=whole(parameters, "rank", _WHERE, hint=_HINT)
        )
