"""The end of a key: which part of which decomposition a tensor is. It is the same under every naming of modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

A, B = "lora_A", "lora_B"
A_T, B_T = "lora_A.T", "lora_B.T"
"""Factors that are stored transposed, (d_in, r) and (r, d_out), as MLX stores them."""
ALPHA = "alpha"
MAGNITUDE = "magnitude"

_ENDS: Mapping[str, str] = {
    "lora_A.weight": A,
    "lora_B.weight": B,
    "lora_down.weight": A,
    "lora_up.weight": B,
    "lora.down.weight": A,
    "lora.up.weight": B,
    "lora_linear_layer.down.weight": A,
    "lora_linear_layer.up.weight": B,
    "lora_a.weight": A,
    "lora_b.weight": B,
    "lora_A": A,
    "lora_B": B,
    "lora_a": A_T,
    "lora_b": B_T,
    "m": MAGNITUDE,
    "lora_A.bias": "lora_A.bias",
    "lora_B.bias": "lora_B.bias",
    "lora_down.bias": "lora_A.bias",
    "lora_up.bias": "lora_B.bias",
    "lora_mid.weight": "lora_mid",
    "lora_embedding_A": "lora_embedding_A",
    "lora_embedding_B": "lora_embedding_B",
    "alpha": ALPHA,
    "lora_alpha": ALPHA,
    "dora_scale": MAGNITUDE,
    "lora_magnitude_vector": MAGNITUDE,
    "lora_magnitude_vector.weight": MAGNITUDE,
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "w_norm",
    "b_norm": "b_norm",
    "set_weight": "set_weight",
    "hada_w1_a": "hada_w1_a",
    "hada_w1_b": "hada_w1_b",
    "hada_w2_a": "hada_w2_a",
    "hada_w2_b": "hada_w2_b",
    "hada_t1": "hada_t1",
    "hada_t2": "hada_t2",
    "lokr_w1": "lokr_w1",
    "lokr_w1_a": "lokr_w1_a",
    "lokr_w1_b": "lokr_w1_b",
    "lokr_w2": "lokr_w2",
    "lokr_w2_a": "lokr_w2_a",
    "lokr_w2_b": "lokr_w2_b",
    "lokr_t2": "lokr_t2",
    "oft_blocks": "oft_blocks",
    "oft_diag": "oft_diag",
    "oft_R": "oft_R",
    "oft_R.weight": "oft_R",
    "boft_R": "boft_R",
    "boft_s": "boft_s",
    "rescale": "rescale",
    "on_input": "on_input",
    "ia3_l": "ia3_l",
    "a1.weight": "glora_a1",
    "a2.weight": "glora_a2",
    "b1.weight": "glora_b1",
    "b2.weight": "glora_b2",
    "bm.weight": "glora_bm",
    "scale": "scale",
    "weight": "weight",
    "bias": "bias",
    "lora_E": "lora_E",
}
"""The last one to three components of a key, and the role that they mean."""

_LEAVES = frozenset({"weight", "bias"})
_LEGACY = {"down.weight": A, "up.weight": B}
_LEGACY_LAYERS = ("_lora", "_lora1", "_lora2")
"""Old layers of diffusers and XLabs: how the component before it ends."""

BUFFERS = frozenset({"inv_freq", "original_inv_freq", "position_ids", "cos_cached", "sin_cached", "masked_bias"})
"""Leaves of what a model computes for itself, and nobody trains."""

WEAK = frozenset({"weight", "bias", "scale", ALPHA})
"""Roles that also occur in files that are no adapter."""


class Part(NamedTuple):
    """A key, taken apart: the module's name as the file writes it, the role, and the adapter's name if it is there."""

    stem: str
    role: str
    adapter: str = ""


_part: Callable[[tuple[str, str, str]], Part] = partial(tuple.__new__, Part)
"""`Part` of a tuple, in half the time: it is made for every key of a file."""


def part_of(key: str) -> Part | None:
    """Take a key apart; None if its end is none that is known."""
    dot = key.rfind(".")
    if dot <= 0:
        return None
    last = key[dot + 1 :]
    if last not in _LEAVES:
        role = _ENDS.get(last)
        return _numbered(key, dot) if role is None else _part((key[:dot], role, ""))
    second_dot = key.rfind(".", 0, dot)
    if second_dot > 0:
        two = key[second_dot + 1 :]
        role = _ENDS.get(two)
        if role is not None:
            return _part((key[:second_dot], role, ""))
        legacy = _LEGACY.get(two)
        if legacy is not None and key.endswith(_LEGACY_LAYERS, 0, second_dot) and key.find(".", 1) < second_dot:
            return _part((key[:second_dot], legacy, ""))
        found = _with_third(key, second_dot, dot)
        if found is not None:
            return found
    return _part((key[:dot], last, ""))


def _with_third(key: str, second_dot: int, dot: int) -> Part | None:
    """Where the last three components count: `lora.down.weight`, `lora_A.name.weight`."""
    start = key.rfind(".", 0, second_dot)
    if start <= 0:
        return None
    role = _ENDS.get(key[start + 1 :])
    if role is not None:
        return _part((key[:start], role, ""))
    third, second, last = key[start + 1 : second_dot], key[second_dot + 1 : dot], key[dot + 1 :]
    named = _ENDS.get(f"{third}.{last}")
    return Part(key[:start], named, second) if named is not None and third.startswith("lora_") else None


def _numbered(key: str, dot: int) -> Part | None:
    """`oft_blocks.3` and `lora_embedding_A.default`."""
    start = key.rfind(".", 0, dot)
    second, last = key[start + 1 : dot], key[dot + 1 :]
    if start <= 0:
        return None
    if second == "oft_blocks" and last.isdigit():
        return Part(key[:start], f"oft_blocks.{int(last)}")
    named = second in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    return Part(key[:start], _ENDS[second], last) if named else None
