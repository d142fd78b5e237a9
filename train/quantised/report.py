"""What became of a base model that was quantised: sizes and errors, of each matrix and in all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.quantised.block_format import BlockFormat, numel_of
from train.quantised.search import FormatChoice

FACTOR_BITS = {"float32": 32, "float16": 16, "nf8": 8.125}
"""Precisions in which L1·L2 may be counted; nf8 in blocks of 64 with scales of 8 bits."""
OFFSET_BYTES = 4


@dataclass(frozen=True, slots=True)
class MatrixReport:
    """One matrix; the squares are of Frobenius norms.

    Attributes:
        packed_bytes: of codes and scales, as they are stored, without the offset.
        energy: ‖W‖².
        plain: ‖W − round(W)‖², of quantising alone.
        error: ‖W − Q − L1·L2‖².
        weighted: ‖√F ∘ (W − Q − L1·L2)‖; None without Fisher.
        unweighted_start: whether its Fisher was 0, so that it was decomposed without.
        iterations: rounds that were computed.
    """

    path: str
    shape: tuple[int, int]
    form: BlockFormat
    packed_bytes: int
    energy: float
    plain: float
    error: float
    weighted: float | None
    unweighted_start: bool
    iterations: int
    polished: bool

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "path": self.path,
            "shape": list(self.shape),
            "format": self.form.to_list(),
            "bits_per_weight": self.form.bits_per_weight,
            "relative_error": _ratio(self.error, self.energy),
            "relative_error_of_quantising_alone": _ratio(self.plain, self.energy),
            "weighted_error": self.weighted,
            "fisher_is_zero": self.unweighted_start,
            "iterations": self.iterations,
            "polished": self.polished,
        }


@dataclass(frozen=True, slots=True)
class QuantisationReport:
    """The whole model; `dense_bytes` is what the quantised matrices took before."""

    matrices: Sequence[MatrixReport]
    rank: int
    dense_bytes: int
    folder_bytes: int
    choice: FormatChoice | None
    budget_bits: float | None
    fisher: Mapping[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        numel = sum(numel_of(item.shape) for item in self.matrices)
        packed = sum(item.packed_bytes for item in self.matrices)
        factors = sum(self.rank * sum(item.shape) for item in self.matrices)
        bits = 8 * packed / numel
        energy = math.fsum(item.energy for item in self.matrices)
        found: dict[str, Any] = {
            "method": "lq-lora",
            "rank": self.rank,
            "matrices": len(self.matrices),
            "weights": numel,
            "bits_per_weight": bits,
            "bits_per_weight_with_factors": {
                name: bits + factors * width / numel for name, width in FACTOR_BITS.items()
            },
            "packed_bytes": packed,
            "offset_bytes": OFFSET_BYTES * len(self.matrices),
            "dense_bytes": self.dense_bytes,
            "model_bytes": self.folder_bytes,
            "relative_error": relative_error(self.matrices),
            "relative_error_of_quantising_alone": _ratio(math.fsum(item.plain for item in self.matrices), energy),
            "fisher": None if self.fisher is None else dict(self.fisher),
        }
        if self.choice is not None:
            found["allocation"] = {
                "budget_bits": self.budget_bits,
                "cost": self.choice.cost,
                "cost_of_best_single_format": self.choice.uniform_cost,
                "gap": self.choice.gap,
            }
        return found | {"modules": [item.to_dict() for item in self.matrices]}


def relative_error(matrices: Sequence[MatrixReport]) -> float:
    """‖W − Q − L1·L2‖ / ‖W‖ over all of them."""
    return _ratio(math.fsum(item.error for item in matrices), math.fsum(item.energy for item in matrices))


def _ratio(above: float, below: float) -> float:
    return float(f"{math.sqrt(above / below):.6g}") if below > 0 else 0.0
