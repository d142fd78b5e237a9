"""The frame of the pictures, as SVG. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from typing import Literal, Protocol

MEDIA_TYPE = "image/svg+xml"
TEXT_STYLE = "text{font:12px sans-serif;fill:#444}"


class Drawing(Protocol):
    """A picture of a job: its name within the job (lower-case words with hyphens), and what it shows."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    def draw(self) -> str:
        """As SVG."""
        ...


def document(width: int, height: int, title: str, style: str, parts: Iterable[str]) -> str:
    """A whole picture on white. `title` is what a screen reader says; all text but `parts` is escaped here."""
    size = f'width="{width}" height="{height}"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{TEXT_STYLE}{style}</style>",
        f'<rect {size} fill="#fff"/>',
    ]
    return "\n".join([*head, *parts, "</svg>", ""])


def text(
    x: float,
    y: float,
    words: str,
    anchor: Literal["start", "middle", "end"] = "start",
    *,
    fill: str | None = None,
    turned: float = 0,
) -> str:
    """Words at a place, escaped; `turned` by so many degrees around it."""
    attributes = "" if anchor == "start" else f' text-anchor="{anchor}"'
    # The style sheet would win over an attribute.
    attributes += "" if fill is None else f' style="fill:{fill}"'
    attributes += f' transform="rotate({turned:g} {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{escape(words)}</text>'


def ticks(low: float, high: float) -> list[float]:
    """Round numbers around the range, about five."""
    span = high - low or abs(high) or 1.0
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    unit = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / unit), math.ceil(high / unit)
    return [float(f"{number * unit:.10g}") for number in range(first, max(last, first + 1) + 1)]
