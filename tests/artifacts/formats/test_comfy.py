"""ComfyUI. The trap: names of a model's first implementation, where one layer is several of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Make = Callable[..., Any]
AB = ("lora_A.weight", "lora_B.weight")


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


def test_text_encoders_are_told_by_their_kind(reading: Make, pair: Make) -> None:
    shapes = pair("text_encoders.clip_g.text_model.encoder.layers.31.mlp.fc1", 5120, 1280, ends=AB)
    (module,) = reading(shapes).modules
    assert module.path == "text_encoder_2.text_model.encoder.layers.31.mlp.fc1"


def test_a_model_with_a_few_names_of_another_keeps_its_own(reading: Make, pair: Make) -> None:
    block = "diffusion_model.layers.0"
    shapes = pair(f"{block}.attention.qkv", 192, 64, ends=AB)
    for name in ("attention.o", "attention.gate", "moe.up"):
        shapes |= pair(f"{block}.{name}", 64, 64, ends=AB)
    found = reading(shapes)
    assert found.architecture is None
    assert [module.path for module in found.modules] == [
        f"{block}.{name}" for name in ("attention.gate", "attention.o", "attention.qkv", "moe.up")
    ]


def test_modules_that_a_model_does_not_have_are_told(reading: Make, pair: Make) -> None:
    shapes = pair("diffusion_model.blocks.0.self_attn.q", 5120, 5120) | pair(
        "diffusion_model.vace_blocks.0.self_attn.q", 5120, 5120
    )
    found = reading(shapes)
    assert found.architecture == "wan-14b"
    assert "1 modules are none of Wan" in found.warnings[0]
    assert {module.path for module in found.modules} == {
        "transformer.blocks.0.attn1.to_q",
        "diffusion_model.vace_blocks.0.self_attn.q",
    }


def test_names_whose_beginning_was_cut_off(reading: Make, pair: Make) -> None:
    shapes = pair("diffusion_model.sformer_blocks.0.attn.add_q_proj", 6144, 6144, ends=AB)
    (module,) = reading(shapes).modules
    assert module.path == "transformer.transformer_blocks.0.attn.add_q_proj"


@pytest.mark.parametrize("key", ["blocks.0.diff_m", "blocks.0.modulation", "blocks.39.diff_m", "head.modulation"])
def test_parameters_of_no_layer_keep_the_rest_from_being_merged(reading: Make, pair: Make, key: str) -> None:
    shapes = pair("diffusion_model.blocks.0.self_attn.q", 5120, 5120, ends=AB)
    found = reading({**shapes, f"diffusion_model.{key}": [1, 6, 5120]})
    assert found.refusals == (f"1 tensors may change what no adapted module has: 'diffusion_model.{key}'",)
    assert not any(key in text for text in found.warnings)


def test_what_a_model_computes_for_itself_is_no_parameter(reading: Make, pair: Make) -> None:
    shapes = pair("diffusion_model.blocks.0.self_attn.q", 5120, 5120, ends=AB)
    found = reading({**shapes, "diffusion_model.freqs.inv_freq": [64], "step": [1]})
    assert not found.refusals
    assert "2 tensors are no part of an adapter and are ignored" in found.warnings[0]
