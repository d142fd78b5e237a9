"""Which types of adapters can be made a plain LoRA, and what that needs of the base model. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

MAX_EXACT_RANK = 1024
"""Largest rank of an exact form that is written without being asked for."""
MAX_FORM_RANK = 4096
"""Largest rank of a form that is worked with at all, to be cut to a smaller one."""

MAX_FORM_SIDE = 1 << 20
"""Longest side of a ΔW that is made of small factors."""
MAX_FORM_BYTES = 1 << 30
"""Of the factors of one module, in float32."""
MAX_RESULT_BYTES = 1 << 33
"""Of a whole result, in float32: as large as an upload may be, unless the settings say otherwise."""

Need = Literal["nothing", "sides", "weights"]

CONVERTIBLE: Mapping[str, Need] = MappingProxyType(
    {
        "adalora": "nothing",
        "loha": "nothing",
        "lokr": "nothing",
        "lq_lora": "nothing",
        "vera": "sides",
        "dora": "weights",
    }
)
"""Type of the adapter → what of its base model has to be known."""

PACKED = "lq_lora"
"""The type that was trained beside packed weights, and that becomes a model together with those."""
