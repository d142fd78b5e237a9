"""Dtypes of factors: which are written, and which holds which. Imports neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

WRITABLE: Mapping[str, str] = MappingProxyType({"float32": "F32", "bfloat16": "BF16", "float16": "F16"})
"""The dtypes that files can be handed out in, by their usual names."""

_HELD_BY = {
    "F32": ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"),
    "F16": ("F16", "F8_E4M3", "F8_E5M2"),
    "BF16": ("BF16", "F8_E4M3", "F8_E5M2"),
}


def holds(dtype: str, source: str) -> bool:
    """Whether every number of `source` is one of `dtype`."""
    return source in _HELD_BY[dtype]


def is_float(dtype: str) -> bool:
    """Whether the tensors of this dtype are numbers that may be rounded."""
    return dtype in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
