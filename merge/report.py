"""What a merge did, per module and in total, as numbers that need no dense matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from artifacts.algebra import product_norm
from merge.result import ClusterReport, MergedModule


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One module of the merged adapter.

    `products` are the Frobenius inner products ⟨ΔWᵢ, ΔWⱼ⟩ of its owners; the energies belong to the exact weighted sum
    D and to the result D'.

    Attributes:
        rank: components that the module really has; the rest up to the adapter's rank is zero padding.
        energy, result_energy, error: ‖D‖²_F, ‖D'‖²_F and ‖D' − D‖²_F.
        figures: what else the method has to say, by name.
        norm_factors: by what norm_equalize multiplied each owner's ΔW.
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
    figures: Mapping[str, float] = field(default_factory=dict)
    norm_factors: tuple[float, ...] | None = None

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
            "figures": {name: _rounded(value) for name, value in self.figures.items()},
            "norm_factors": [_rounded(value) for value in self.norm_factors] if self.norm_factors else None,
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
            "figures": self._mean_figures(),
        }

    def _mean_figures(self) -> dict[str, float | None]:
        """The methods' own figures, averaged over the modules that have them."""
        names = dict.fromkeys(name for module in self.modules for name in module.figures)
        means = {}
        for name in names:
            values = [module.figures[name] for module in self.modules if name in module.figures]
            means[name] = _rounded(math.fsum(values) / len(values))
        return means

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
    path: str, merged: MergedModule, *, padded: int, scale: float, norm_factors: Mapping[int, float]
) -> ModuleReport:
    """Compare a merged module with the exact sum scale·B·diag(w)·A of its stack."""
    stack = merged.stack
    order = sorted(range(len(stack.members)), key=lambda number: stack.members[number][0])
    owners = tuple(stack.members[number][0] for number in order)
    products = stack.products.tolist()
    weights = stack.weights * scale
    energy = scale**2 * stack.energy
    if merged.coordinates is None:
        result_energy, error = _measure_factors(merged, weights, energy)
    else:
        result_energy, error = merged.coordinates.measured(stack.gram_A, stack.gram_B, weights, energy)
    return ModuleReport(
        path=path,
        rank=merged.A.shape[0],
        padded=padded,
        owners=owners,
        energy=energy,
        result_energy=result_energy,
        error=error,
        products=tuple(tuple(products[row][column] for column in order) for row in order),
        clusters=merged.clusters,
        figures=merged.figures,
        norm_factors=tuple(norm_factors[owner] for owner in owners) if norm_factors else None,
    )


def _measure_factors(merged: MergedModule, weights: Tensor, energy: float) -> tuple[float, float]:
    """‖D'‖² and ‖D' − D‖² of a result B'·A' that has no coordinates in the stack, through k×n products."""
    result_energy = product_norm(merged.A, merged.B)
    left, right = merged.B.T @ merged.stack.B, merged.A @ merged.stack.A.T
    shared = float((left.double() * weights * right.double()).sum())
    return result_energy, max(result_energy - 2 * shared + energy, 0.0)


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
