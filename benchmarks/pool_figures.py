"""What a benchmark found: figures with their goals, as a table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        goal: what it is to reach; None for a figure that only explains others.
        at_most: whether the goal is an upper bound; else it is a lower one.
        detail: how it was measured, and what belongs to it.
    """

    name: str
    value: float
    unit: str
    goal: float | None = None
    at_most: bool = True
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal


def show(section: str, figures: Sequence[Figure]) -> None:
    print(f"\n{section}")
    width = max((len(figure.name) for figure in figures), default=0)
    for figure in figures:
        goal = "" if figure.goal is None else f"goal {'≤' if figure.at_most else '≥'} {figure.goal:g} {figure.unit}"
        verdict = {None: "", True: "PASS", False: "MISS"}[figure.passed]
        print(f"  {figure.name:{width}}  {figure.value:10.2f} {figure.unit:8} {goal:22} {verdict}")


def write(
    section: str, figures: Sequence[Figure], arguments: dict[str, Any], folder: Path, prefix: str = "pool_"
) -> Path:
    """Write benchmarks/results/<prefix><section>.json and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{prefix}{section}.json"
    document = {
        "section": section,
        "arguments": arguments,
        "machine": {"cores": os.cpu_count(), "system": platform.platform(), "load": os.getloadavg()},
        "figures": [asdict(figure) | {"passed": figure.passed} for figure in figures],
    }
    path.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
    return path


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)
