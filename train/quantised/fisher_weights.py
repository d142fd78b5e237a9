"""An empirical Fisher as a measure of error: which entries the loss feels (arXiv:2311.12023, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Heuristic = Literal["two-sided", "row", "col"]
FLOOR = 1e-8
"""Least weight of a row or column, as a share of the largest: one that the loss does not feel divides by no zero."""


@dataclass(frozen=True, slots=True)
class Fisher:
    """The empirical Fisher of a base model's weights.

    Attributes:
        values: path → F, (d_out, d_in) float32: the sum of the squared gradients of equally many samples.
        heuristic: which of its means weigh the low-rank part.
        notes: how it was estimated, for the report.
    """

    values: Mapping[str, Tensor]
    heuristic: Heuristic = "two-sided"
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RowColumnWeights:
    """diag(row)·E·diag(col) stands for √F∘E, which has a closed solution only if √F has rank one.

    Attributes:
        row: (d_out,), positive.
        col: (d_in,), positive.
    """

    row: Tensor
    col: Tensor

    @classmethod
    def of(cls, fisher: Tensor, heuristic: Heuristic) -> RowColumnWeights:
        """row[i] = √(mean_j F[i,j]) and col[j] = √(mean_i F[i,j]), or ones on the side that the heuristic drops.

        Args:
            fisher: F, (d_out, d_in), not negative and not all zero.
        """
        row, col = fisher.mean(dim=1).sqrt(), fisher.mean(dim=0).sqrt()
        if heuristic == "row":
            col = torch.ones_like(col)
        elif heuristic == "col":
            row = torch.ones_like(row)
        return cls(row.clamp(min=FLOOR * float(row.max())), col.clamp(min=FLOOR * float(col.max())))

    def applied(self, matrix: Tensor) -> Tensor:
        """diag(row)·matrix·diag(col)."""
        return self.row[:, None] * matrix * self.col
