"""Any header is understood or refused with an error of ours; every key has its verdict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from artifacts.errors import RankwiseError
from artifacts.formats.reading import read_keys
from artifacts.formats.roles import part_of
from artifacts.formats.table import READERS
from artifacts.identification import identify
from scripts.formats_report import CorpusValues, header_of

STARTS = st.sampled_from(
    (
        "lora_unet_",
        "lora_te1_",
        "lora_transformer_",
        "diffusion_model.",
        "unet.",
        "transformer.",
        "base_model.model.",
        "",
    )
)
NAMES = st.sampled_from(
    (
        "down_blocks_0_attentions_0_proj_in",
        "double_blocks_0_img_attn_qkv",
        "double_blocks.0.img_attn.qkv",
        "blocks.0.self_attn.q",
        "final_layer.adaLN_modulation.1",
        "text_model_encoder_layers_0_mlp_fc1",
        "x.processor.to_q_lora",
        "..",
        "",
    )
)
ENDS = st.sampled_from(
    (
        "lora_down.weight",
        "lora_up.weight",
        "lora_mid.weight",
        "lora_A.default.weight",
        "lora_B",
        "alpha",
        "dora_scale",
        "hada_w1_a",
        "hada_w1_b",
        "lokr_w1",
        "lokr_w2_b",
        "lokr_t2",
        "oft_blocks",
        "oft_blocks.3",
        "diff",
        "diff_b",
        "w_norm",
        "on_input",
        "weight",
        "down.weight",
        "",
    )
)
KEYS = st.tuples(STARTS, NAMES, ENDS).map(lambda parts: f"{parts[0]}{parts[1]}.{parts[2]}") | st.text(max_size=30)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 4, 24, 320]), max_size=5)
DTYPES = st.sampled_from(["F32", "BF16", "I64", "U8"])


@given(st.dictionaries(KEYS, st.tuples(DTYPES, SHAPES), max_size=8))
@example({f"unet.mid.{end}": ("F32", []) for end in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")})
@example({f"unet.mid.{end}": ("F32", [2] * (end[-1] == "b")) for end in ("hada_w1_a", "hada_w1_b")})
@settings(max_examples=300, deadline=None)
def test_any_header_is_understood_or_refused(tensors: dict[str, tuple[str, list[int]]]) -> None:
    header = header_of({"tensors": tensors})
    assert identify(header).sentence
    try:
        found = read_keys(header, CorpusValues({}))
    except RankwiseError as error:
        assert error.detail
        return
    assert [verdict.key for verdict in found.verdicts] == list(tensors)
    assert all(verdict.note for verdict in found.verdicts if verdict.use == "ignored")
    assert found.modules or found.typed
    for module in found.modules:
        assert module.rank > 0
        assert module.d_out > 0


@given(KEYS)
@settings(max_examples=300, deadline=None)
def test_a_key_is_its_stem_and_its_end(key: str) -> None:
    part = part_of(key)
    if part is None:
        return
    assert key.startswith(f"{part.stem}.")
    for reader in READERS:
        place = reader.place(part.stem, part.role)
        assert place is None or key.find(place.name.rpartition(".")[0]) >= 0


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", "unet."])
def test_the_order_of_keys_does_not_matter(prefix: str, header: Callable[..., Any], pair: Callable[..., Any]) -> None:
    stem = "mid_block_attentions_0_proj_in" if prefix.endswith("_") else "mid_block.attentions.0.proj_in"
    shapes = {**pair(f"{prefix}{stem}", 1280, 1280), f"{prefix}{stem}.alpha": []}
    turned = dict(reversed(list(shapes.items())))
    first, second = (read_keys(header(item), CorpusValues({})) for item in (shapes, turned))
    assert (first.modules, first.format) == (second.modules, second.format)
