"""AnimateDiff. The trap: attention blocks are counted from 0 there, and their wrapper is not in diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Make = Callable[..., Any]


def test_motion_modules(reading: Make, pair: Make) -> None:
    stem = "down_blocks.0.motion_modules.1.temporal_transformer.transformer_blocks.0.attention_blocks.1.processor"
    (module,) = reading(pair(f"{stem}.to_out_lora", 320, 320, ends=("down.weight", "up.weight"))).modules
    assert module.path == "unet.down_blocks.0.motion_modules.1.transformer_blocks.0.attn2.to_out.0"


def test_both_attentions_of_a_motion_module_are_other_modules(reading: Make, pair: Make) -> None:
    block = "mid_block.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks"
    shapes = {}
    for number in (0, 1):
        shapes |= pair(f"{block}.{number}.processor.to_q_lora", 1280, 1280, ends=("down.weight", "up.weight"))
    found = [module.path for module in reading(shapes).modules]
    assert [path.rpartition("transformer_blocks.0.")[2] for path in found] == ["attn1.to_q", "attn2.to_q"]
