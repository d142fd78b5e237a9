"""The first LoRAs of diffusers. The trap: `to_out` means another module in the UNet than in the text encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from artifacts.errors import FormatUnknown

Make = Callable[..., Any]


def test_old_attention_processors(reading: Make, pair: Make) -> None:
    ends = ("down.weight", "up.weight")
    shapes = {
        **pair("down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora", 320, 320, ends=ends),
        **pair("text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora", 768, 768, ends=ends),
    }
    assert [module.path for module in reading(shapes).modules] == [
        "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
    ]


def test_the_prefix_of_the_unet_may_be_there_or_not(reading: Make, pair: Make) -> None:
    stem = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora"
    ends = ("down.weight", "up.weight")
    with_it, without = (reading(pair(name, 320, 768, ends=ends)) for name in (f"unet.{stem}", stem))
    assert with_it.modules[0].path == without.modules[0].path
    assert with_it.format == without.format == "attention-processors"


def test_layers_that_no_processor_had_are_not_told(reading: Make, pair: Make) -> None:
    stem = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_nowhere_lora"
    with pytest.raises(FormatUnknown):
        reading(pair(stem, 320, 768, ends=("down.weight", "up.weight")))
