"""What a comparison of merges found, as JSON. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merge.comparison import Compared


def rank_by(report: dict[str, Any], metric: str, order: Mapping[str, float]) -> None:
    """Put the candidates of a report into another order.

    Args:
        metric: what it is by.
        order: label → number, the smallest of which is the best; who has none is not ranked.
    """
    ranked = [label for label in report["ranking"] if label in order]
    report["ranking"] = sorted(ranked, key=lambda label: order[label])
    report["ranked_by"] = metric


def comparison_report(compared: Sequence[Compared], seconds: float) -> dict[str, Any]:
    """One row for each candidate in the order of the request; `ranking` has their labels, the best one first.

    The best is the one nearest to the exact weighted sum; of equals, the one of the smaller rank.

    Args:
        seconds: of the whole comparison.
    """
    rows = [_row(item) for item in compared]
    first = compared[0].report
    return {
        "adapters": [{key: item[key] for key in ("id", "name", "weight")} for item in first.adapters],
        "compatibility": first.compatibility,
        "interference": first.totals()["interference"],
        "candidates": rows,
        "ranking": [row["label"] for row in sorted(rows, key=_distance)],
        "ranked_by": "relative_error",
        "seconds": round(seconds, 3),
    }


def _row(item: Compared) -> dict[str, Any]:
    report = item.report
    totals = report.totals()
    return {
        "label": item.candidate.label,
        "method": report.method,
        "parameters": dict(report.parameters),
        "rank": report.rank,
        "dtype": report.dtype,
        "energy_kept": totals["energy_kept"],
        "relative_error": totals["relative_error"],
        "rounding_error": report.rounding_error,
        "clusters": totals["clusters"],
        "seconds": round(report.seconds, 3),
        "warnings": list(report.warnings),
        "modules": [
            {
                "path": module.path,
                "rank": module.rank,
                "energy_kept": module.to_dict()["energy_kept"],
                "relative_error": module.to_dict()["relative_error"],
            }
            for module in report.modules
        ],
    }


def _distance(row: dict[str, Any]) -> tuple[float, int]:
    error = row["relative_error"]
    return (float("inf") if error is None else float(error), int(row["rank"]))
