"""No prefix at all. The trap: any dotted name could be one, so that only a stored list makes it a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from artifacts.errors import FormatUnknown

Make = Callable[..., Any]
AB = ("lora_A.weight", "lora_B.weight")


def test_an_adapters_name_in_bare_keys(reading: Make, pair: Make) -> None:
    ends = ("lora_A.default.weight", "lora_B.default.weight")
    found = reading(pair("transformer_blocks.59.txt_mlp.net.2", 3072, 12288, ends=ends))
    assert (found.format, found.architecture) == ("bare", "qwen-image")


def test_bare_names_of_a_language_model_are_not_taken_for_a_pipelines(reading: Make, pair: Make) -> None:
    with pytest.raises(FormatUnknown, match="no stored architecture"):
        reading(pair("model.layers.0.self_attn.q_proj", 64, 64, ends=AB))
