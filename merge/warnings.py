"""What the figures of a merge say against trusting its result."""

from __future__ import annotations

from collections.abc import Sequence

from merge.report import ModuleReport
from merge.result import ClusterReport

IDENTIFIABLE_COSINE = 0.15
"""Mean cosine inside clusters below which k-means is nearly flat: its result is then decided by the seed."""

NOTABLE_CROSS_TERMS = 0.1

NAMED_MODULES = 5


def merge_warnings(modules: Sequence[ModuleReport]) -> list[str]:
    """One line per kind of finding, with a stable first word."""
    warnings = []
    flat = [module.path for module in modules if module.clusters and _is_flat(module.clusters)]
    if flat:
        warnings.append(
            f"clusters_not_identifiable: in {len(flat)} of {len(modules)} modules the members of a cluster are nearly "
            f"orthogonal (mean cosine below {IDENTIFIABLE_COSINE}), so that other seeds give other clusters: "
            f"{_some(flat)}. The methods `cat` and `svd` do not cluster."
        )
    capped = [module.path for module in modules if module.clusters and module.clusters.capped]
    if capped:
        warnings.append(
            f"reweighting_capped: in {len(capped)} modules members nearly cancel in their mean, and the reweighting "
            f"factor was cut to reweight_cap: {_some(capped)}."
        )
    crossed = [module.path for module in modules if module.figures.get("cross_term_error", 0.0) > NOTABLE_CROSS_TERMS]
    if crossed:
        warnings.append(
            f"cross_terms: in {len(crossed)} of {len(modules)} modules the products of one adapter's B with another's "
            f"A are more than {NOTABLE_CROSS_TERMS:.0%} of the exact sum (cross_term_error): {_some(crossed)}. "
            "The methods `linear` and `svd` have no such terms."
        )
    empty = [module.path for module in modules if module.energy == 0]
    if empty:
        warnings.append(f"zero_delta: the exact weighted sum is zero in {len(empty)} modules: {_some(empty)}.")
    return warnings


def _is_flat(clusters: ClusterReport) -> bool:
    return clusters.mean_cosine is not None and clusters.mean_cosine < IDENTIFIABLE_COSINE


def _some(paths: Sequence[str]) -> str:
    rest = len(paths) - NAMED_MODULES
    return ", ".join(paths[:NAMED_MODULES]) + (f" and {rest} more" if rest > 0 else "")
