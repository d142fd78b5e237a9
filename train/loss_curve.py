"""The loss of a training as a picture, drawn as SVG. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from artifacts.svg import document, text, ticks

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 32, 44
SMOOTHING = 0.9  # of the running mean, per point
_STYLE = (
    ".axis{stroke:#bbb}.grid{stroke:#eee}"
    ".raw{fill:none;stroke:#9db7e8;stroke-width:1}.smooth{fill:none;stroke:#1f4fa8;stroke-width:2}"
)


def draw(points: Sequence[tuple[int, Mapping[str, float]]], title: str) -> str:
    """The picture of the points that have a finite loss; without any it says so.

    Args:
        points: (step, numbers) in the order of the steps.
    """
    series = [
        (step, float(numbers["loss"])) for step, numbers in points if math.isfinite(numbers.get("loss", math.nan))
    ]
    parts = [text(LEFT, 20, f"loss per step (thin), running mean (thick) · {title}")]
    if series:
        parts += _plot(series)
    else:
        parts.append(text(WIDTH // 2, HEIGHT // 2, "no step has been measured yet", "middle"))
    return document(WIDTH, HEIGHT, f"loss of {title}", _STYLE, parts)


def _plot(series: Sequence[tuple[int, float]]) -> list[str]:
    losses = [loss for _, loss in series]
    marks = ticks(min(losses), max(losses))
    low, high = min(marks[0], min(losses)), max(marks[-1], max(losses))
    last = max(series[-1][0], 1)

    def place(step: float, loss: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (loss - low) / (high - low)
        return x, y

    parts = []
    for tick in marks:
        _, y = place(0, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text(LEFT - 8, y + 4, f"{tick:g}", "end"))
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    for tick in ticks(0, last):
        if tick <= last and tick == int(tick):
            x, _ = place(tick, low)
            parts.append(text(x, base + 18, str(int(tick)), "middle"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "step", "middle"))
    parts.append(_line("raw", (place(step, loss) for step, loss in series)))
    parts.append(_line("smooth", (place(step, loss) for step, loss in _smoothed(series))))
    return parts


def _line(name: str, places: Iterable[tuple[float, float]]) -> str:
    return f'<polyline class="{name}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>'


def _smoothed(series: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The exponential mean, without its bias towards the start."""
    mean, weight, found = 0.0, 0.0, []
    for step, loss in series:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        found.append((step, mean / weight))
    return found
