"""What a merge did, per module and in total, as numbers that need no dense matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from artifacts.algebra import delta_products, squared_norm
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


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One module of the merged adapter.

    `products` are the Frobenius inner products ⟨ΔWᵢ, ΔWⱼ⟩ of its owners; the energies belong to the exact weighted sum
    D and to the result D'.

    Attributes:
        rank: components that the module really has; the rest up to the adapter's rank is zero padding.
        energy, result_energy, error: ‖D‖²_F, ‖D'‖²_F and ‖D' − D‖²_F.
    """

    path: str
    rank: int
    padded: int
    owners: tuple[int, ...]
    energy: float
    result_energy: float
    error: float
    products: tuple[tuple[float, ...], ...]
    clusters: ClusterReport | None = None

    @property
    def energy_kept(self) -> float | None:
        return self.result_energy / self.energy if self.energy > 0 else None

    @property
    def relative_error(self) -> float | None:
        return math.sqrt(self.error / self.energy) if self.energy > 0 else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "rank": self.rank,
            "padded": self.padded,
            "owners": list(self.owners),
            "energy_kept": _rounded(self.energy_kept),
            "relative_error": _rounded(self.relative_error),
            "interference": [[_rounded(value) for value in row] for row in cosines(self.products)],
            "clusters": asdict(self.clusters) if self.clusters else None,
        }


@dataclass(frozen=True)
class MergeReport:
    """The whole merge. `rounding_error` is what the cast to the output dtype cost, on a probe vector per module."""

    method: str
    parameters: Mapping[str, Any]
    adapters: Sequence[Mapping[str, Any]]
    rank: int
    compatibility: str
    modules: Sequence[ModuleReport]
    dropped: Sequence[str]
    warnings: Sequence[str]
    rounding_error: float
    reload_error: float
    seconds: float
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "method": self.method,
            "parameters": dict(self.parameters),
            "adapters": [dict(item) for item in self.adapters],
            "rank": self.rank,
            "dtype": self.dtype,
            "compatibility": self.compatibility,
            "warnings": list(self.warnings),
            "dropped_modules": list(self.dropped),
            "total": self.totals(),
            "reload_check": {"passed": True, "largest_relative_error": self.reload_error},
            "rounding_error": self.rounding_error,
            "seconds": round(self.seconds, 3),
            "modules": [module.to_dict() for module in self.modules],
        }

    def totals(self) -> dict[str, Any]:
        """Energy kept, relative error and interference over all modules together."""
        energy = math.fsum(module.energy for module in self.modules)
        error = math.fsum(module.error for module in self.modules)
        kept = math.fsum(module.result_energy for module in self.modules)
        return {
            "modules": len(self.modules),
            "padded_modules": sum(module.padded > 0 for module in self.modules),
            "energy_kept": _rounded(kept / energy) if energy > 0 else None,
            "relative_error": _rounded(math.sqrt(error / energy)) if energy > 0 else None,
            "interference": [[_rounded(value) for value in row] for row in self._total_cosines()],
            "clusters": self._cluster_totals(),
        }

    def _total_cosines(self) -> list[list[float | None]]:
        size = len(self.adapters)
        total = [[0.0] * size for _ in range(size)]
        for module in self.modules:
            for row, i in enumerate(module.owners):
                for column, j in enumerate(module.owners):
                    total[i][j] += module.products[row][column]
        return cosines(total)

    def _cluster_totals(self) -> dict[str, Any] | None:
        clusters = [module.clusters for module in self.modules if module.clusters]
        if not clusters:
            return None
        known = [item.mean_cosine for item in clusters if item.mean_cosine is not None]
        return {
            "mean_cosine": _rounded(math.fsum(known) / len(known)) if known else None,
            "mean_agreement": _rounded(math.fsum(item.agreement for item in clusters) / len(clusters)),
            "largest_factor": _rounded(max(item.largest_factor for item in clusters)),
            "capped": sum(item.capped for item in clusters),
        }


def measure_module(
    path: str,
    stack: Stack,
    coordinates: Tensor,
    *,
    rank: int,
    padded: int,
    scale: float,
    clusters: ClusterReport | None = None,
) -> ModuleReport:
    """Compare a result, given by its coordinates K: (n, n) with ΔW' = B·K·A, with the exact sum scale·B·diag(w)·A."""
    owners, position = torch.unique(stack.owners, return_inverse=True)
    exact = torch.diag(stack.weights * scale)
    products = delta_products(stack.gram_A, stack.gram_B, position, len(owners))
    return ModuleReport(
        path=path,
        rank=rank,
        padded=padded,
        owners=tuple(owners.tolist()),
        energy=squared_norm(exact, stack.gram_A, stack.gram_B),
        result_energy=squared_norm(coordinates, stack.gram_A, stack.gram_B),
        error=squared_norm(coordinates - exact, stack.gram_A, stack.gram_B),
        products=tuple(tuple(row) for row in products.tolist()),
        clusters=clusters,
    )


def cosines(products: Sequence[Sequence[float]]) -> list[list[float | None]]:
    """Cosines between deltas from their inner products; null where a delta is zero."""
    norms = [math.sqrt(max(products[i][i], 0.0)) for i in range(len(products))]
    return [
        [
            max(-1.0, min(1.0, products[i][j] / (norms[i] * norms[j]))) if norms[i] and norms[j] else None
            for j in range(len(products))
        ]
        for i in range(len(products))
    ]


def _rounded(value: float | None) -> float | None:
    """Six significant digits: the rest is rounding of the computation."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
