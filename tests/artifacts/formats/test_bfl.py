"""Black Forest Labs' names without a prefix. The trap: fused layers that nothing but their beginning tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Make = Callable[..., Any]
AB = ("lora_A.weight", "lora_B.weight")


def test_black_forest_labs_names_without_prefix(reading: Make, pair: Make) -> None:
    found = reading(pair("double_blocks.0.img_attn.qkv", 9216, 3072, ends=AB))
    assert (found.format, len(found.modules)) == ("bfl", 3)


def test_the_final_modulation_has_its_halves_exchanged(reading: Make, pair: Make) -> None:
    (module,) = reading(pair("final_layer.adaLN_modulation.1", 6144, 3072, ends=AB)).modules
    assert (module.path, module.b_rows) == ("transformer.norm_out.linear", ((3072, 6144), (0, 3072)))


def test_a_single_blocks_first_layer_is_four_modules(reading: Make, pair: Make) -> None:
    found = reading(pair("single_blocks.37.linear1", 21504, 3072, ends=AB)).modules
    rows = {module.path.rpartition("single_transformer_blocks.37.")[2]: module.b_rows for module in found}
    assert rows == {
        "attn.to_q": ((0, 3072),),
        "attn.to_k": ((3072, 6144),),
        "attn.to_v": ((6144, 9216),),
        "proj_mlp": ((9216, 21504),),
    }
