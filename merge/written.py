"""A merged module as it is written: at the rank of the adapter, in the dtype of the file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from merge.reload import Probe
from merge.result import MergedModule


@dataclass(frozen=True, slots=True, eq=False)
class WrittenModule:
    """Factors A: (rank, d_in) and B: (d_out, rank), of which the last `padded` components are zeros."""

    merged: MergedModule
    padded: int
    A: Tensor
    B: Tensor
    probe: Probe

    @classmethod
    def of(cls, path: str, merged: MergedModule, rank: int, dtype: torch.dtype, earlier: Iterable[Self] = ()) -> Self:
        """One of the `earlier` ones of the same module, where its factors are the very same: `linear` may be `svd`."""
        for other in earlier:
            same = merged.A is other.merged.A and merged.B is other.merged.B
            if same and other.A.dtype == dtype and other.A.shape[0] == rank:
                return other
        padded = rank - merged.A.shape[0]
        A, B = _padded(merged.A, padded, 0).to(dtype), _padded(merged.B, padded, 1).to(dtype)
        return cls(merged, padded, A, B, Probe.of(path, merged.A, merged.B, A, B))


def _padded(matrix: Tensor, count: int, dim: int) -> Tensor:
    if not count:
        return matrix
    shape = list(matrix.shape)
    shape[dim] = count
    return torch.cat([matrix, matrix.new_zeros(shape)], dim=dim)
