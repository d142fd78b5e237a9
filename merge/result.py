"""What a merge method returns for one module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from merge.coordinates import Coordinates
from merge.stack import Stack


@dataclass(frozen=True, slots=True)
class ClusterReport:
    """How a module's components were clustered (LoRA-LEGO).

    Attributes:
        inertia: Σ wᵢ‖xᵢ − σᵢμ‖².
        sizes: members per cluster.
        mean_cosine: mean cosine of two members of one cluster; null when every cluster has one member.
        agreement: adjusted Rand index between the two best restarts.
        largest_factor: largest reweighting factor f_c.
        capped: clusters whose factor was cut to `reweight_cap`.
    """

    inertia: float
    sizes: tuple[int, ...]
    mean_cosine: float | None
    agreement: float
    largest_factor: float
    capped: int


@dataclass(frozen=True, slots=True, eq=False)
class MergedModule:
    """Factors of the merged module, with scaling 1.

    Attributes:
        A: (k, d_in); B: (d_out, k), in the compute dtype.
        stack: the components that the result is made of; the one that was given, or the same ΔWᵢ in other terms.
        coordinates: what B·A is in terms of stack.B and stack.A, by which the report measures the result; None when
            both sides leave the span of the components, and the result is measured by its factors.
        clusters: filled by methods that cluster.
        figures: what else the method has to say of the module, by name.
    """

    A: Tensor
    B: Tensor
    stack: Stack
    coordinates: Coordinates | None
    clusters: ClusterReport | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
