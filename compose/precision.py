"""The floating-point numbers that an image is computed in. Imports no torch."""

from __future__ import annotations

from typing import Literal

from artifacts.errors import FieldError, RequestInvalid

Precision = Literal["float32", "float16", "bfloat16"]


def precision_of(wanted: Literal["auto"] | Precision, device: str) -> Precision:
    """The dtype on a device; auto is float16 on a GPU and float32 elsewhere.

    Raises:
        RequestInvalid: float16 on a CPU.
    """
    on_gpu = device.startswith("cuda")
    if wanted == "auto":
        return "float16" if on_gpu else "float32"
    if wanted == "float16" and not on_gpu:
        problem = f"float16 needs a GPU; this runs on {device}"
        raise RequestInvalid(
            f"{problem}.", hint="Take bfloat16 or float32.", errors=[FieldError("/precision", problem)]
        )
    return wanted
