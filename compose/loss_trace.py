"""The loss of a composition's updates as a picture, drawn as SVG. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from artifacts.svg import document, text, ticks

WIDTH, HEIGHT = 720, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 32, 44
_STYLE = (
    ".axis{stroke:#bbb}.grid{stroke:#eee}.step{stroke:#ccc;stroke-dasharray:3 3}"
    ".loss{fill:none;stroke:#1f4fa8;stroke-width:2}.dot{fill:#1f4fa8}"
)
_MOST_LABELS = 12


def draw(updates: Sequence[Mapping[str, Any]]) -> str:
    """The loss before each update, in their order; dashed lines are where a new step of the sampler begins.

    Args:
        updates: of a report, {step, repeat, before, …} each; at least one.
    """
    losses = [float(item["before"]) for item in updates]
    marks = ticks(min(losses), max(losses))
    low, high = min(marks[0], *losses), max(marks[-1], *losses)
    last = max(len(losses) - 1, 1)

    def x_of(number: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * number / last

    def y_of(loss: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (loss - low) / (high - low)

    parts = [text(LEFT, 20, "contrastive loss before each update of the latent")]
    for mark in marks:
        y = y_of(mark)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text(LEFT - 8, y + 4, f"{mark:g}", "end"))
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    starts = [
        number for number, item in enumerate(updates) if number == 0 or item["step"] != updates[number - 1]["step"]
    ]
    every = math.ceil(len(starts) / _MOST_LABELS)
    for place, number in enumerate(starts):
        x = x_of(number)
        parts.append(f'<line class="step" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{base}"/>')
        if place % every == 0:
            parts.append(text(x, base + 18, str(updates[number]["step"]), "middle"))
    points = [(x_of(number), y_of(loss)) for number, loss in enumerate(losses)]
    parts.append(f'<polyline class="loss" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
    parts += [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in points]
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "step of the sampler", "middle"))
    return document(WIDTH, HEIGHT, "loss of the updates", _STYLE, parts)
