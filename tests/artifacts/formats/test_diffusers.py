"""diffusers. The trap: three generations of endings, and an alpha that stands in the metadata alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from artifacts.errors import FileBroken, FormatUnknown

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


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({"lora_alpha": 16}, 4.0),
        ({"lora_alpha": 16, "use_rslora": True}, 8.0),
        ({"lora_alpha": 16, "alpha_pattern": {"attn1.to_q": 2}}, 0.5),
        ({"lora_alpha": 16, "r": 64, "rank_pattern": {"to_q": 4}}, 4.0),
    ],
)
@pytest.mark.parametrize("component", ["unet", ""])
def test_the_configuration_of_the_metadata_tells_the_scaling_of_old_names(
    reading: Make, pair: Make, fields: dict[str, Any], scaling: float, component: str
) -> None:
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    shapes = pair(stem, 1280, 1280, ends=("lora.down.weight", "lora.up.weight"))
    assert reading(shapes, configs={component: {"r": 4, **fields}}).modules[0].scaling == scaling


def test_a_rank_of_the_metadata_that_the_factors_do_not_have_is_refused(reading: Make, pair: Make) -> None:
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    shapes = pair(stem, 1280, 1280, ends=("lora.down.weight", "lora.up.weight"))
    with pytest.raises(FileBroken, match="of rank 4, the configuration tells 8"):
        reading(shapes, configs={"unet": {"r": 8, "lora_alpha": 8}})


def test_a_component_that_the_metadata_passes_over_has_no_scaling(reading: Make, pair: Make) -> None:
    stem = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    shapes = pair(stem, 768, 768, ends=("lora.down.weight", "lora.up.weight"))
    found = reading(shapes, configs={"unet": {"r": 4, "lora_alpha": 8}})
    assert found.refusals == ("the configuration in the metadata tells no scaling of text_encoder",)


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


@pytest.mark.parametrize(
    "key",
    ["attn.norm_q.weight", "attn.to_k.bias", "proj.modules_to_save.default.weight", "proj.original_module.weight"],
)
def test_full_weights_are_never_passed_over(reading: Make, pair: Make, key: str) -> None:
    block = "transformer.transformer_blocks.0"
    for start in (f"{block}.", "transformer_blocks.0."):
        found = reading({**pair(f"{start}attn.to_q", 3072, 3072, ends=AB), f"{start}{key}": [3072]})
        assert found.refusals == (f"1 weights of the base are stored in full, for instance '{start}{key}'",)


def test_several_adapters_in_one_file_are_refused(reading: Make, pair: Make) -> None:
    start = "transformer.transformer_blocks.0.attn"
    shapes = pair(f"{start}.to_q", 3072, 3072, ends=("lora_A.one.weight", "lora_B.one.weight"))
    assert len(reading(shapes).modules) == 1
    with pytest.raises(FileBroken, match="several adapters: one, two"):
        reading(shapes | pair(f"{start}.to_k", 3072, 3072, ends=("lora_A.two.weight", "lora_B.two.weight")))
