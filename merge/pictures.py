"""The pictures of a merge and of a comparison, made of their reports when somebody looks. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from artifacts.heat_map import HeatMap, by_layer, by_number
from artifacts.svg import Drawing
from merge.catalog import SEARCH
from merge.search_chart import TrialChart

MAX_SHOWN = 64
"""Adapters of a picture: with more, no cell could be read."""
_LABEL = 40


def pictures_of_merge(report: Mapping[str, Any]) -> list[Drawing]:
    """How the adapters' deltas lie to each other, and where the result is far from the exact weighted sum.

    Of a search first its trials; the rest is of the best of them.
    """
    if report.get("method") == SEARCH.name:
        return [TrialChart.of(report), *pictures_of_merge(report["merge"])]
    found = _interference(report.get("adapters") or (), (report.get("total") or {}).get("interference") or ())
    errors = {module["path"]: module.get("relative_error") for module in report.get("modules") or ()}
    if errors:
        title = f"Relative error of {report['method']} against the exact weighted sum, by layer"
        found.append(by_layer("errors", title, errors, note="0: exact. 1: as far away as nothing at all would be."))
    return found


def pictures_of_comparison(report: Mapping[str, Any]) -> list[Drawing]:
    """Interference once, and the error of every layer beside that of the other candidates."""
    found = _interference(report.get("adapters") or (), report.get("interference") or ())
    candidates = report.get("candidates") or ()
    paths = sorted({module["path"] for item in candidates for module in item["modules"]}, key=by_number)
    if not paths:
        return found
    columns = [{module["path"]: module["relative_error"] for module in item["modules"]} for item in candidates]
    found.append(
        HeatMap(
            "errors",
            "Relative error against the exact weighted sum, by layer and candidate",
            [_short(path) for path in paths],
            [_short(str(item["label"])) for item in candidates],
            [[column.get(path) for column in columns] for path in paths],
            note="0: exact. 1: as far away as nothing at all would be.",
        )
    )
    return found


def _interference(adapters: Sequence[Mapping[str, Any]], cosines: Sequence[Sequence[float | None]]) -> list[Drawing]:
    if len(adapters) < 2 or len(cosines) != len(adapters):
        return []
    names = [_short(str(item.get("name") or item["id"])) for item in adapters[:MAX_SHOWN]]
    left_out = len(adapters) - len(names)
    note = "1: the same direction. 0: no interference. Below 0: they undo each other."
    return [
        HeatMap(
            "interference",
            "Cosine between the deltas of the adapters, over all layers",
            names,
            names,
            [list(row[:MAX_SHOWN]) for row in cosines[:MAX_SHOWN]],
            note=note + (f" {left_out} more adapters are not shown." if left_out else ""),
        )
    ]


def _short(name: str) -> str:
    """The end of a name tells more of it: of a path the layer."""
    return name if len(name) <= _LABEL else "…" + name[-(_LABEL - 1) :]
