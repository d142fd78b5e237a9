"""A full-rank ΔW cut to a plain LoRA: what is kept, and how much is lost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.adapted_layers import LowRank


@dataclass(frozen=True, slots=True)
class Truncation:
    """The best factors of a rank for every layer (Eckart-Young), and ‖ΔW − B·A‖_F / ‖ΔW‖_F.

    Attributes:
        relative_error: over all layers together.
        worst: the layer that loses most, and its error.
    """

    factors: dict[str, LowRank]
    rank: int
    relative_error: float
    worst: tuple[str, float]

    def to_dict(self) -> dict[str, Any]:
        path, error = self.worst
        return {
            "form": "lora",
            "exact": False,
            "rank": self.rank,
            "relative_error": self.relative_error,
            "worst_module": path,
            "worst_relative_error": error,
            "loads_with": "PEFT and whatever else loads a LoRA",
        }


def truncate(deltas: Iterable[tuple[str, Tensor]], rank: int) -> Truncation:
    """Cut each ΔW (d_out, d_in), one at a time, to `rank`."""
    factors: dict[str, LowRank] = {}
    lost = total = 0.0
    worst = ("", 0.0)
    for path, delta in deltas:
        U, S, Vh = torch.linalg.svd(delta.to(torch.float32), full_matrices=False)
        root = S[:rank].sqrt()
        factors[path] = LowRank((root[:, None] * Vh[:rank]).contiguous(), (U[:, :rank] * root).contiguous(), 1.0)
        tail, energy = float(S[rank:].double().square().sum()), float(S.double().square().sum())
        lost, total = lost + tail, total + energy
        error = (tail / energy) ** 0.5 if energy else 0.0
        worst = max(worst, (path, error), key=lambda item: item[1])
    return Truncation(factors, rank, (lost / total) ** 0.5 if total else 0.0, worst)
