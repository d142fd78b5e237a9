"""Bytes of tensors as numbers and back, without torch: what a server does to hand a file out in another dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def decode(raw: bytes, dtype: str) -> Array:
    """The numbers, exactly: a flat array of float64 for F64, of float32 for any other dtype."""
    if dtype in _PLAIN:
        found = np.frombuffer(raw, _PLAIN[dtype])
        return found if dtype == "F64" else found.astype(np.float32)
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E5M2":  # the upper byte of a float16
        return (np.frombuffer(raw, np.uint8).astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    return _e4m3_table()[np.frombuffer(raw, np.uint8)]


def encode(values: Array, dtype: str) -> bytes:
    """The bytes of `values` in a dtype of `float_dtypes.WRITABLE`, rounded to the nearest, ties to even. What is too
    large becomes infinite."""
    with np.errstate(over="ignore", under="ignore"):
        if dtype != "BF16":
            return values.astype(_PLAIN[dtype]).tobytes()
        single = np.ascontiguousarray(values, np.float32)
    bits = single.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    return np.where(np.isnan(single), np.uint16(0x7FC0), rounded).astype("<u2").tobytes()


def _e4m3_table() -> Array:
    """OCP's E4M3 without infinities: four exponent bits with bias 7, three of the mantissa; 0x7F is NaN."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    sizes = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    sizes[(codes & 127) == 127] = np.nan
    return np.where(codes < 128, sizes, -sizes).astype(np.float32)
