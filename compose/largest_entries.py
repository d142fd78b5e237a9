"""Sums over the entries of ΔW = scale·B·A, without ever holding more than a few rows of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 2**22
"""Entries of ΔW at a time."""


@dataclass(frozen=True, slots=True)
class EntrySums:
    """Of the absolute entries of ΔW: of all, and of the k largest."""

    all: float
    largest: float


def entry_sums(A: Tensor, B: Tensor, scale: float, k: int, chunk: int = _CHUNK) -> EntrySums:
    """Σ|ΔW| and the sum of its k largest absolute entries, in float32; of all where there are fewer.

    Args:
        A: (r, d_in) or a convolution's (r, c_in, kh, kw). B: (d_out, r) or (d_out, r, 1, 1).
    """
    down, up = A.detach().flatten(1).float(), B.detach().flatten(1).float()
    rows = max(1, chunk // down.shape[1])
    total, top = 0.0, torch.zeros(0, device=down.device)
    for start in range(0, len(up), rows):
        entries = (up[start : start + rows] @ down).abs().flatten()
        total += float(entries.double().sum())
        best = entries.topk(min(k, len(entries))).values
        top = torch.cat([top, best])
        top = top.topk(min(k, len(top))).values
    return EntrySums(abs(scale) * total, abs(scale) * float(top.double().sum()))
