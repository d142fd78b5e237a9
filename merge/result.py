"""What a merge method returns for one module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from merge.report import ClusterReport
from merge.stack import Stack


@dataclass(frozen=True, slots=True, eq=False)
class MergedModule:
    """Factors of the merged module, with scaling 1.

    Attributes:
        A: (k, d_in); B: (d_out, k), in the compute dtype.
        stack: the components that the result is made of; the one that was given, or the same ΔWᵢ in other terms.
        coordinates: (n, n) float64 K with B·A = stack.B·K·stack.A, by which the report measures the result.
        clusters: filled by methods that cluster.
    """

    A: Tensor
    B: Tensor
    stack: Stack
    coordinates: Tensor
    clusters: ClusterReport | None = None
