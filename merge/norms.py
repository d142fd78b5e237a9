"""Equal norms before a merge (arXiv:2508.01148): adapters whose deltas differ in size drown each other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch

from artifacts.adapter import Adapter
from artifacts.algebra import product_norm
from merge.plan import PlannedModule
from merge.stack import Stack
from merge.threads import module_threads


def module_factors(stack: Stack) -> dict[int, float]:
    """By which each owner's ΔWᵢ is multiplied to have the median Frobenius norm of those in the module."""
    norms = stack.products.diagonal().clamp_min(0).sqrt().tolist()
    return _to_median({owner: norm for (owner, _), norm in zip(stack.members, norms, strict=True)})


def adapter_factors(
    modules: Sequence[PlannedModule], adapters: Mapping[int, Adapter], dtype: torch.dtype, device: torch.device
) -> dict[int, float]:
    """By which each adapter is multiplied to have the median Frobenius norm, over all its modules together.

    Reads every factor once, on top of the merge's own pass.
    """

    def squares(module: PlannedModule) -> list[tuple[int, float]]:
        found = []
        for owner, description in module.owners:
            factors = adapters[owner].factors(description)
            A, B = (factor.to(device=device, dtype=dtype) for factor in (factors.A, factors.B))
            found.append((owner, factors.scaling**2 * product_norm(A, B)))
            adapters[owner].release(module.path)
        return found

    parts: dict[int, list[float]] = {owner: [] for owner in adapters}
    with module_threads() as pool:
        for found in pool.map(squares, modules):
            for owner, square in found:
                parts[owner].append(square)
    return _to_median({owner: math.sqrt(math.fsum(values)) for owner, values in parts.items()})


def _to_median(norms: Mapping[int, float]) -> dict[int, float]:
    """Those without a finite norm above 0 keep what they have."""
    known = [norm for norm in norms.values() if math.isfinite(norm) and norm > 0]
    median = statistics.median(known) if known else 1.0
    return {owner: median / norm if math.isfinite(norm) and norm > 0 else 1.0 for owner, norm in norms.items()}
