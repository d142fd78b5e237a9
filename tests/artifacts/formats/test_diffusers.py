"""diffusers. The trap: three generations of endings, and an alpha that stands in the metadata alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from artifacts.errors import FormatUnknown

Make = Callable[..., Any]
AB = ("lora_A.weight", "lora_B.weight")


def test_diffusers_names_in_all_their_endings(reading: Make, pair: Make) -> None:
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    for ends in (
        AB,
        ("lora.down.weight", "lora.up.weight"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    ):
        (module,) = reading(pair(stem, 1280, 1280, ends=ends)).modules
        assert (module.path, module.scaling) == (stem, 1.0)


def test_alpha_of_the_metadata_holds_for_its_component(reading: Make, pair: Make) -> None:
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    found = reading(pair(stem, 1280, 1280, ends=("lora.down.weight", "lora.up.weight")), alphas={"unet": 16.0})
    assert found.modules[0].scaling == 4.0


def test_wrappers_and_prefixes_are_removed_and_told(reading: Make, pair: Make) -> None:
    stem = "module.transformer._orig_mod.transformer_blocks.0.attn.to_q"
    found = reading(pair(stem, 3072, 3072, ends=AB))
    assert found.modules[0].path == "transformer.transformer_blocks.0.attn.to_q"
    assert sum("it was removed" in text for text in found.warnings) == 2


def test_a_module_that_no_list_has_keeps_its_dotted_name(reading: Make, pair: Make) -> None:
    found = reading(pair("transformer.hovercraft.0.eels", 64, 64, ends=AB))
    assert found.modules[0].path == "transformer.hovercraft.0.eels"
    assert found.architecture is None


def test_names_of_gpt_2_and_chatglm_are_no_transformer_of_a_pipeline(reading: Make, pair: Make) -> None:
    for stem in ("transformer.h.0.attn.c_attn", "transformer.encoder.layers.0.mlp.dense_h_to_4h"):
        with pytest.raises(FormatUnknown, match="no stored architecture"):
            reading(pair(stem, 64, 64, ends=AB))
