"""OneTrainer. The trap: its text encoders carry kohya's names, and the file is no mixture for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from artifacts.identification import identify

Make = Callable[..., Any]


def test_onetrainer_names(reading: Make, pair: Make) -> None:
    found = reading(pair("lora_transformer_transformer_blocks_0_ff_net_0_proj", 12288, 3072))
    assert (found.format, found.modules[0].path) == ("onetrainer", "transformer.transformer_blocks.0.ff.net.0.proj")


def test_text_encoders_with_kohyas_names_belong_to_it(reading: Make, pair: Make, header: Make) -> None:
    shapes = {
        **pair("lora_transformer_transformer_blocks_0_attn_to_q", 3072, 3072),
        **pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 3072, 768),
    }
    assert identify(header(shapes)).name == "onetrainer"
    assert [module.path for module in reading(shapes).modules] == [
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "transformer.transformer_blocks.0.attn.to_q",
    ]
