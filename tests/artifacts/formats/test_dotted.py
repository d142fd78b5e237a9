"""Dotted names under all prefixes: what each reader is there for."""

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


def test_comfy_names_of_the_first_implementation(reading: Make, pair: Make) -> None:
    shapes = {
        **pair("diffusion_model.blocks.0.self_attn.o", 5120, 5120),
        **pair("diffusion_model.blocks.0.cross_attn.k_img", 5120, 5120),
        **pair("diffusion_model.blocks.0.ffn.2", 5120, 13824),
    }
    found = reading(shapes)
    assert (found.format, found.architecture) == ("comfy", "wan-14b-i2v")
    assert [module.path for module in found.modules] == [
        "transformer.blocks.0.attn1.to_out.0",
        "transformer.blocks.0.attn2.add_k_proj",
        "transformer.blocks.0.ffn.net.2",
    ]


def test_a_fused_projection_beside_its_parts_is_redundant(reading: Make, pair: Make) -> None:
    block = "diffusion_model.layers.0.attention"
    shapes = pair(f"{block}.qkv", 11520, 3840)
    for name in ("to_q", "to_k", "to_v"):
        shapes |= pair(f"{block}.{name}", 3840, 3840)
    found = reading(shapes)
    assert len(found.modules) == 3
    assert not any(module.b_rows for module in found.modules)
    assert [item.note for item in found.verdicts if item.use == "ignored"] == [
        "the same projections stand in the file one by one"
    ] * 2


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


def test_motion_modules(reading: Make, pair: Make) -> None:
    stem = "down_blocks.0.motion_modules.1.temporal_transformer.transformer_blocks.0.attention_blocks.1.processor"
    (module,) = reading(pair(f"{stem}.to_out_lora", 320, 320, ends=("down.weight", "up.weight"))).modules
    assert module.path == "unet.down_blocks.0.motion_modules.1.transformer_blocks.0.attn2.to_out.0"


def test_xlabs_streams(reading: Make, pair: Make) -> None:
    ends = ("down.weight", "up.weight")
    found = reading(pair("double_blocks.0.processor.qkv_lora2", 9216, 3072, ends=ends))
    assert [module.path.rpartition(".")[2] for module in found.modules] == ["add_k_proj", "add_q_proj", "add_v_proj"]
    assert found.format == "xlabs"


def test_black_forest_labs_names_without_prefix(reading: Make, pair: Make) -> None:
    found = reading(pair("double_blocks.0.img_attn.qkv", 9216, 3072, ends=AB))
    assert (found.format, len(found.modules)) == ("bfl", 3)


def test_onetrainer_names(reading: Make, pair: Make) -> None:
    found = reading(pair("lora_transformer_transformer_blocks_0_ff_net_0_proj", 12288, 3072))
    assert (found.format, found.modules[0].path) == ("onetrainer", "transformer.transformer_blocks.0.ff.net.0.proj")


def test_an_adapters_name_in_bare_keys(reading: Make, pair: Make) -> None:
    ends = ("lora_A.default.weight", "lora_B.default.weight")
    found = reading(pair("transformer_blocks.59.txt_mlp.net.2", 3072, 12288, ends=ends))
    assert (found.format, found.architecture) == ("bare", "qwen-image")


def test_bare_names_of_a_language_model_are_not_taken_for_a_pipelines(reading: Make, pair: Make) -> None:
    with pytest.raises(FormatUnknown, match="no stored architecture"):
        reading(pair("model.layers.0.self_attn.q_proj", 64, 64, ends=AB))


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
