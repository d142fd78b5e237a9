"""The trials of a search as a picture: what each was worth, and the best until then. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from artifacts.svg import document, text, ticks

WIDTH, PLOT, TOP, LEFT, RIGHT, BOTTOM, LINE = 720, 300, 48, 76, 16, 48, 18
# They can be told apart with every common colour blindness; from the ninth method on they repeat.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#8c6d31")
_STYLE = (
    ".grid{stroke:#e4e4e4}.axis{stroke:#888}.best{fill:none;stroke:#222;stroke-width:1.5}"
    ".outside{fill:#fff;stroke-width:1.5}.failed{stroke:#999;stroke-width:1.5}"
)


@dataclass(frozen=True, slots=True)
class TrialChart:
    """What the trials of a search were worth.

    Attributes:
        name, title: as of any picture of a job.
        metric: what is drawn, by its name in the figures.
        trials: (label of the method, value or None) of each in their order.
        base: the value of the base model alone. What is worse stands at the edge, so that the rest can be read.
        higher_is_better: whether the best is the highest.
    """

    name: str
    title: str
    metric: str
    trials: Sequence[tuple[str, float | None]]
    base: float
    higher_is_better: bool

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Self:
        """Of the report of a search."""
        metric = str(report["metric"])
        found = [(str(item["label"]), (item.get("figures") or {}).get(metric)) for item in report["trials"]]
        return cls(
            "trials",
            f"{metric} of every trial, and the best until then",
            metric,
            found,
            report["evaluation"]["base"][metric],
            bool(report["higher_is_better"]),
        )

    def draw(self) -> str:
        """The picture as SVG."""
        labels = list(dict.fromkeys(label for label, _ in self.trials))
        colours = {label: COLOURS[number % len(COLOURS)] for number, label in enumerate(labels)}
        bottom = TOP + PLOT
        marks, low, high = self._scale()
        parts = [text(LEFT, 20, self.title), text(LEFT, 38, f"the base model alone: {self.base:.4g}", fill="#777")]
        for mark in marks:
            y = _y(mark, low, high)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(text(LEFT - 8, y + 4, f"{mark:g}", "end"))
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
        numbers = [int(mark) for mark in ticks(0, max(len(self.trials) - 1, 1)) if mark == int(mark)]
        parts += (text(self._x(at), bottom + 16, str(at), "middle") for at in numbers if at < len(self.trials))
        parts.append(text((LEFT + WIDTH - RIGHT) / 2, bottom + 34, "trial", "middle"))
        parts.append(f'<polyline class="best" points="{" ".join(self._best(low, high))}"/>')
        for number, (label, value) in enumerate(self.trials):
            parts.append(self._point(number, value, colours[label], low, high))
        for number, label in enumerate(labels):
            y = bottom + BOTTOM + LINE * number + 8
            parts.append(f'<circle cx="{LEFT}" cy="{y - 4}" r="4" fill="{colours[label]}"/>')
            parts.append(text(LEFT + 12, y, label))
        return document(WIDTH, bottom + BOTTOM + LINE * len(labels) + 8, self.title, _STYLE, parts)

    def _scale(self) -> tuple[list[float], float, float]:
        """Marks of the axis, and the values at its ends."""
        shown = [value for _, value in self.trials if value is not None and not self._outside(value)]
        shown = shown or [value for _, value in self.trials if value is not None] or [self.base]
        marks = ticks(min(shown), max(shown))
        return marks, marks[0], marks[-1]

    def _outside(self, value: float) -> bool:
        return value < self.base if self.higher_is_better else value > self.base

    def _x(self, number: int) -> float:
        return LEFT + 12 + (WIDTH - RIGHT - LEFT - 24) * number / max(len(self.trials) - 1, 1)

    def _best(self, low: float, high: float) -> list[str]:
        best: float | None = None
        places = []
        for number, (_, value) in enumerate(self.trials):
            if value is not None and (best is None or (value > best if self.higher_is_better else value < best)):
                if best is not None:
                    places.append(f"{self._x(number):.1f},{_y(best, low, high):.1f}")
                best = value
            if best is not None:
                places.append(f"{self._x(number):.1f},{_y(best, low, high):.1f}")
        return places

    def _point(self, number: int, value: float | None, colour: str, low: float, high: float) -> str:
        x = self._x(number)
        if value is None:
            y = TOP + PLOT - 6
            return f'<path class="failed" d="M{x - 4:.1f} {y - 4}l8 8m0 -8l-8 8"/>'
        kind = f'class="outside" stroke="{colour}"' if not low <= value <= high else f'fill="{colour}"'
        return f'<circle cx="{x:.1f}" cy="{_y(value, low, high):.1f}" r="4" {kind}/>'


def _y(value: float, low: float, high: float) -> float:
    share = (min(max(value, low), high) - low) / (high - low)
    return TOP + PLOT * (1 - share)
