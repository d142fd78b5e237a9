"""Two layouts in one file: an adapter of several components, or an ambiguity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from artifacts.errors import FormatUnknown

Make = Callable[..., Any]
AB = ("lora_A.weight", "lora_B.weight")


def test_two_layouts_of_one_module_are_ambiguous(reading: Make, pair: Make) -> None:
    shapes = {
        **pair("transformer.transformer_blocks.0.attn.to_out.0", 3072, 3072, ends=AB),
        **pair("lora_unet_double_blocks_0_img_attn_proj", 3072, 3072),
    }
    with pytest.raises(FormatUnknown, match="mixes two layouts: a diffusers LoRA and a kohya"):
        reading(shapes)


def test_two_layouts_of_different_modules_are_one_adapter(reading: Make, pair: Make) -> None:
    shapes = {
        **pair("transformer.transformer_blocks.0.attn.to_out.0", 3072, 3072, ends=AB),
        **pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 3072, 768),
    }
    assert reading(shapes).format == "diffusers+kohya"
