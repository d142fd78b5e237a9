"""The shapes of learning rates over the steps. Imports no torch."""

from __future__ import annotations

import math


def rate_at(shape: str, step: int, total: int, warmup: int) -> float:
    """Share of the peak at a step: "constant", "linear" or "cosine" after a linear warm-up; 0 at step `total`."""
    if step < warmup:
        return step / warmup
    if shape == "constant":
        return 1.0
    left = (total - step) / max(total - warmup, 1)
    return max(left, 0.0) if shape == "linear" else 0.5 * (1 - math.cos(math.pi * min(max(left, 0.0), 1.0)))
