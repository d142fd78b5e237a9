"""Flattened names: only a list of modules tells where the dots were. alpha stands beside the factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from artifacts.errors import FileBroken, FormatUnknown

Make = Callable[..., Any]
TO_OUT = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def test_underscores_that_are_dots_and_underscores_that_are_none(reading: Make, pair: Make) -> None:
    found = reading({**pair(TO_OUT, 320, 320), f"{TO_OUT}.alpha": []}, {f"{TO_OUT}.alpha": 2.0})
    (module,) = found.modules
    assert module.path == "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert (module.rank, module.alpha, module.scaling) == (4, 2.0, 0.5)
    assert {verdict.use for verdict in found.verdicts} == {"used"}
    assert found.verdicts[0].note == "the path is from the list of modules of Stable Diffusion 1.x"


def test_text_encoders_are_told_by_their_prefix_and_their_sides(reading: Make, pair: Make) -> None:
    stems = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768),
        "lora_te2_text_model_encoder_layers_31_mlp_fc1": (5120, 1280),
    }
    shapes = {key: shape for stem, sides in stems.items() for key, shape in pair(stem, *sides).items()}
    assert [module.path for module in reading(shapes).modules] == [
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder_2.text_model.encoder.layers.31.mlp.fc1",
    ]


def test_sdxl_comes_under_the_names_of_its_first_implementation(reading: Make, pair: Make) -> None:
    shapes = {
        **pair("lora_unet_input_blocks_4_1_proj_in", 640, 640),
        **pair("lora_unet_middle_block_1_transformer_blocks_9_attn2_to_k", 1280, 2048),
        "lora_unet_output_blocks_2_2_conv.lora_down.weight": [4, 1280, 3, 3],
        "lora_unet_output_blocks_2_2_conv.lora_up.weight": [1280, 4, 1, 1],
    }
    found = reading(shapes)
    assert found.architecture == "sdxl"
    assert [(module.path, module.kind) for module in found.modules] == [
        ("unet.down_blocks.1.attentions.0.proj_in", "linear"),
        ("unet.mid_block.attentions.0.transformer_blocks.9.attn2.to_k", "linear"),
        ("unet.up_blocks.0.upsamplers.0.conv", "conv"),
    ]


def test_the_third_text_encoder_of_a_flux_file_is_its_second(reading: Make, pair: Make) -> None:
    shapes = {
        **pair("lora_unet_double_blocks_0_img_attn_proj", 3072, 3072),
        **pair("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 4096, 4096),
    }
    assert [module.path for module in reading(shapes).modules] == [
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
        "transformer.transformer_blocks.0.attn.to_out.0",
    ]


def test_a_fused_projection_is_split_by_its_rows(reading: Make, pair: Make) -> None:
    found = reading(pair("lora_unet_single_blocks_3_linear1", 21504, 3072, rank=8))
    assert {module.path.rpartition("3.")[2]: module.b_rows for module in found.modules} == {
        "attn.to_q": ((0, 3072),),
        "attn.to_k": ((3072, 6144),),
        "attn.to_v": ((6144, 9216),),
        "proj_mlp": ((9216, 21504),),
    }
    assert {module.rank for module in found.modules} == {8}


def test_parts_that_were_trained_one_by_one_keep_their_small_rank(reading: Make, pair: Make) -> None:
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    shapes = {**pair(stem, 9216, 3072, rank=12), f"{stem}.alpha": []}
    found = reading(shapes, {f"{stem}.alpha": 6.0}, {"re:lora_up": "blockdiag"})
    assert [(module.rank, module.rank_span, module.scaling, module.alpha) for module in found.modules] == [
        (4, (4, 8), 0.5, 2.0),  # to_k
        (4, (0, 4), 0.5, 2.0),  # to_q
        (4, (8, 12), 0.5, 2.0),
    ]


def test_modulation_has_its_halves_exchanged(reading: Make, pair: Make) -> None:
    (module,) = reading(pair("lora_unet_final_layer_adaLN_modulation_1", 6144, 3072)).modules
    assert (module.path, module.b_rows) == ("transformer.norm_out.linear", ((3072, 6144), (0, 3072)))


def test_an_unknown_block_is_named_and_keeps_the_rest_from_being_merged(reading: Make, pair: Make) -> None:
    strange = "lora_unet_down_blocks_9_attentions_0_proj_in"
    found = reading({**pair(TO_OUT, 320, 320), **pair(strange, 320, 320)})
    assert found.partial
    assert strange in found.refusals[0]
    assert [verdict.use for verdict in found.verdicts] == ["used", "used", "ignored", "ignored"]


def test_names_of_no_stored_model_are_refused(reading: Make, pair: Make) -> None:
    with pytest.raises(FormatUnknown, match="no stored architecture"):
        reading(pair("lora_unet_hovercraft_0_eels", 320, 320))


def test_a_smaller_model_of_the_same_names_is_read_with_a_warning(reading: Make, pair: Make) -> None:
    found = reading(pair(TO_OUT, 32, 32))
    assert not found.refusals
    assert "another size" in found.warnings[0]


def test_sides_that_contradict_each_other_are_refused(reading: Make, pair: Make) -> None:
    with pytest.raises(FileBroken, match="ΔW is 320×768, the module of Stable Diffusion"):
        reading(pair(TO_OUT, 320, 768))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_alpha_must_be_a_number(reading: Make, pair: Make, alpha: float) -> None:
    with pytest.raises(FileBroken, match="alpha is"):
        reading({**pair(TO_OUT, 320, 320), f"{TO_OUT}.alpha": []}, {f"{TO_OUT}.alpha": alpha})


def test_alpha_of_several_numbers_is_refused(reading: Make, pair: Make) -> None:
    with pytest.raises(FileBroken, match="one number is expected"):
        reading({**pair(TO_OUT, 320, 320), f"{TO_OUT}.alpha": [2]})


@pytest.mark.parametrize(
    "end", ["scalar", "lora_C.weight", "lora_down.scale_weight", "lora_up.weight_scale", "diff", "hada_w1_a", "bias"]
)
def test_what_stands_beside_factors_and_is_not_understood_is_never_passed_over(
    reading: Make, pair: Make, end: str
) -> None:
    found = reading({**pair(TO_OUT, 320, 320), f"{TO_OUT}.{end}": [320, 320]})
    assert found.refusals == (f"1 tensors stand beside factors and are not understood: '{TO_OUT}.{end}'",)


def test_what_stands_elsewhere_is_told_and_ignored(reading: Make, pair: Make) -> None:
    found = reading({**pair(TO_OUT, 320, 320), f"{TO_Q}.alpha": [], "scaled_fp8": [2]})
    assert not found.refusals
    assert found.warnings[:2] == (
        f"1 alphas stand without factors and are ignored: '{TO_Q}.alpha'.",
        "1 tensors are no part of an adapter and are ignored: 'scaled_fp8'.",
    )


def test_weights_of_the_base_keep_the_rest_from_being_merged(reading: Make, pair: Make) -> None:
    found = reading({**pair(TO_OUT, 320, 320), "lora_unet_conv_norm_out.bias": [320]})
    assert found.refusals == ("1 weights of the base are stored in full, for instance 'lora_unet_conv_norm_out.bias'",)
    assert not any("lora_unet_conv_norm_out" in text for text in found.warnings), "said once"


def test_what_is_below_an_adapted_module_is_named_once(reading: Make, pair: Make) -> None:
    found = reading({**pair(TO_OUT, 320, 320), f"{TO_OUT}.inner.thing": [320], f"{TO_OUT}.inner.alpha": []})
    (reason,) = found.refusals
    assert reason.startswith("2 tensors stand beside factors and are not understood:")
    assert not any("inner" in text for text in found.warnings)


@pytest.mark.parametrize("start", ["clip_l", "clip_g"])
def test_only_embeddings_of_textual_inversion_are_passed_over(reading: Make, pair: Make, start: str) -> None:
    learned = {start: [2, 768], f"bundle_emb.word.{start}": [2, 768], "emb_params": [2, 768]}
    assert not reading({**pair(TO_OUT, 320, 320), **learned}).refusals
    key = f"{start}.transformer.text_model.final_layer_norm.weight"
    found = reading({**pair(TO_OUT, 320, 320), key: [768]})
    assert found.refusals == (f"1 weights of the base are stored in full, for instance '{key}'",)


def test_a_grouped_convolution_is_described_and_not_merged(reading: Make) -> None:
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    found = reading({f"{stem}.lora_down.weight": [8, 320, 3, 3], f"{stem}.lora_up.weight": [320, 4, 1, 1]})
    assert found.refusals == (
        "unet.down_blocks.0.resnets.0.conv1 is a grouped convolution, whose ΔW is block-diagonal",
    )


def test_factors_of_two_kinds_in_one_module_are_refused(reading: Make, pair: Make) -> None:
    turned = {f"{TO_OUT}.lora_a": [320, 4], f"{TO_OUT}.lora_b": [4, 320]}
    with pytest.raises(FileBroken, match="factors of two kinds"):
        reading({**pair(TO_OUT, 320, 320), **turned})


def test_chroma_has_what_flux_has_not(reading: Make, pair: Make) -> None:
    shapes = {
        **pair("lora_unet_double_blocks_0_img_attn_proj", 3072, 3072),
        **pair("lora_unet_distilled_guidance_layer_layers_3_in_layer", 5120, 5120),
        **pair("lora_unet_distilled_guidance_layer_layers_3_out_layer", 5120, 5120),
    }
    found = reading(shapes)
    assert (found.architecture, found.partial) == ("chroma", False)
    assert [module.path for module in found.modules] == [
        "transformer.distilled_guidance_layer.layers.3.linear_1",
        "transformer.distilled_guidance_layer.layers.3.linear_2",
        "transformer.transformer_blocks.0.attn.to_out.0",
    ]
