"""A merged module as it is written, at the rank of the adapter and in the dtype of the file, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from merge.reload import Probe
from merge.report import ModuleReport, measure_module
from merge.result import MergedModule


@dataclass(frozen=True, slots=True, eq=False)
class WrittenModule:
    """Factors A: (rank, d_in) and B: (d_out, rank), of which the last `report.padded` components are zeros."""

    merged: MergedModule
    A: Tensor
    B: Tensor
    report: ModuleReport
    probe: Probe

    @classmethod
    def of(
        cls,
        path: str,
        merged: MergedModule,
        rank: int,
        dtype: torch.dtype,
        *,
        scale: float,
        norm_factors: Mapping[int, float],
        earlier: Iterable[Self] = (),
    ) -> Self:
        """Cast and measured, or one of the `earlier` ones of the same module where its factors are the very same.

        Args:
            scale, norm_factors: as of `merge.report.measure_module`.
        """
        for other in earlier:
            known = other.merged
            same = merged.A is known.A and merged.B is known.B and merged.stack is known.stack
            if same and other.A.dtype == dtype and other.A.shape[0] == rank:
                report = replace(other.report, clusters=merged.clusters, figures=merged.figures)
                return replace(other, merged=merged, report=report)
        padded = rank - merged.A.shape[0]
        A, B = _padded(merged.A, padded, 0).to(dtype), _padded(merged.B, padded, 1).to(dtype)
        report = measure_module(path, merged, padded=padded, scale=scale, norm_factors=norm_factors)
        return cls(merged, A, B, report, Probe.of(path, merged.A, merged.B, A, B))


def _padded(matrix: Tensor, count: int, dim: int) -> Tensor:
    if not count:
        return matrix
    shape = list(matrix.shape)
    shape[dim] = count
    return torch.cat([matrix, matrix.new_zeros(shape)], dim=dim)
