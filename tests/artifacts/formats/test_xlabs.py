"""XLabs. The trap: a number at the end of the layer tells the stream, image or text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Make = Callable[..., Any]


def test_xlabs_streams(reading: Make, pair: Make) -> None:
    ends = ("down.weight", "up.weight")
    found = reading(pair("double_blocks.0.processor.qkv_lora2", 9216, 3072, ends=ends))
    assert [module.path.rpartition(".")[2] for module in found.modules] == ["add_k_proj", "add_q_proj", "add_v_proj"]
    assert found.format == "xlabs"


def test_the_first_stream_is_the_images(reading: Make, pair: Make) -> None:
    ends = ("down.weight", "up.weight")
    found = reading(pair("double_blocks.0.processor.proj_lora1", 3072, 3072, ends=ends))
    assert [module.path for module in found.modules] == ["transformer.transformer_blocks.0.attn.to_out.0"]
    other = reading(pair("double_blocks.0.processor.proj_lora2", 3072, 3072, ends=ends))
    assert [module.path for module in other.modules] == ["transformer.transformer_blocks.0.attn.to_add_out"]
