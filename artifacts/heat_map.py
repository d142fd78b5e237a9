"""A table of numbers as a picture, such as the rank of every layer by its kind. Imports no torch."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from artifacts.svg import document, text

NAME = r"^[a-z0-9]+(-[a-z0-9]+)*$"
CELL_HEIGHT, MARGIN, TITLE_HEIGHT, LEGEND_HEIGHT = 20, 16, 34, 40
LETTER, LINE = 7.2, 16  # of the 12 px font: width on average, height of a line
LEAST_CELL, LEAST_WIDTH, LEGEND_WIDTH = 48, 420, 160
_TURN_ABOVE = 12  # letters of a column's name that still stand level
_RISE = 0.5  # of a name that is turned by 30°: its height over its length
_STYLE = ".cell{stroke:#fff;stroke-width:1}"

# Both scales can be told apart with every common colour blindness, and lighter always means less.
SEQUENTIAL = ("#f7fbff", "#c6dbef", "#6baed6", "#2171b5", "#08306b")
DIVERGING = ("#7f3b08", "#e08214", "#f7f7f7", "#5aae9e", "#003c30")
MISSING = "#e4e4e4"


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Numbers by row and column.

    Attributes:
        name: of the picture within its job: lower-case words with hyphens.
        title: what it shows.
        rows, columns: their names, top to bottom and left to right.
        values: one sequence for each row, as long as `columns`; None where there is nothing.
        unit: of the values; empty if they have none.
        note: what a reader should know.
    """

    name: str
    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    unit: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError for a name that can not stand in an address, or numbers that do not fill the table."""
        if not re.match(NAME, self.name):
            raise ValueError(f"{self.name!r} is no name of a picture: lower-case words with hyphens")
        if not self.rows or not self.columns:
            raise ValueError(f"the picture {self.name} has no rows or no columns")
        if len(self.values) != len(self.rows) or any(len(row) != len(self.columns) for row in self.values):
            raise ValueError(f"the picture {self.name} needs {len(self.rows)} rows of {len(self.columns)} values")

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """Of what `to_dict` gave."""
        return cls(**document)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def draw(self) -> str:
        """The picture as SVG."""
        finite = [value for row in self.values for value in map(_finite, row) if value is not None]
        scale = _Scale(finite)
        left = round(MARGIN + LETTER * max(map(len, self.rows))) + 8
        letters = max(map(len, self.columns))
        turned = letters > _TURN_ABOVE
        widest = max([0, *(len(_number(value)) for value in finite)])
        cell = round(max(LEAST_CELL, LETTER * (widest + 2), 0 if turned else LETTER * (letters + 1)))
        # The last of the turned names reaches beyond its column.
        overhang = round(LETTER * letters) if turned else 0
        width = max(left + cell * len(self.columns) + overhang + MARGIN, LEAST_WIDTH)
        title = textwrap.wrap(self.title, int((width - 2 * MARGIN) / LETTER)) or [""]
        top = TITLE_HEIGHT + LINE * (len(title) - 1) + (round(LETTER * letters * _RISE) + LINE if turned else LINE + 8)
        bottom = top + CELL_HEIGHT * len(self.rows)
        note = textwrap.wrap(self.note, int((width - 2 * MARGIN) / LETTER))

        parts = [text(MARGIN, 22 + LINE * number, line) for number, line in enumerate(title)]
        for number, name in enumerate(self.columns):
            x = left + cell * (number + 0.5)
            parts.append(text(x, top - 6, name, "start" if turned else "middle", turned=-30 if turned else 0))
        for number, (name, row) in enumerate(zip(self.rows, self.values, strict=True)):
            y = top + CELL_HEIGHT * number
            parts.append(text(left - 8, y + 14, name, "end"))
            parts += (scale.cell(left + cell * place, y, cell, value) for place, value in enumerate(row))
        parts += scale.legend(MARGIN, bottom + 16, self.unit)
        parts += (text(MARGIN, bottom + LEGEND_HEIGHT + LINE * number + 8, line) for number, line in enumerate(note, 1))
        return document(width, bottom + LEGEND_HEIGHT + LINE * (len(note) + 1), self.title, _STYLE, parts)


def write_pictures(own_report: Mapping[str, Any], folder: Path) -> None:
    """Write the pictures in what a method has to tell as `name`.svg."""
    for found in pictures_of(own_report):
        (folder / f"{found.name}.svg").write_text(found.draw(), encoding="utf-8")


def pictures_of(own_report: Mapping[str, Any]) -> list[HeatMap]:
    """The pictures in what a method has to tell, in its order."""
    return [HeatMap.of(found) for found in own_report.get("pictures") or ()]


def by_layer(name: str, title: str, values: Mapping[str, float | None], *, unit: str = "", note: str = "") -> HeatMap:
    """One number for each adapted layer, as a table: a row is a block of the model, a column a kind of layer.

    Args:
        values: by path, such as model.layers.3.self_attn.q_proj: the last number that is not the path's end parts them.
    """
    parted = {path: _part(path) for path in values}
    rows = sorted({row for row, _ in parted.values()}, key=by_number)
    columns = list(dict.fromkeys(column for _, column in sorted(parted.values(), key=lambda found: found[1])))
    table = {place: values[path] for path, place in parted.items()}
    cells = [[table.get((row, column)) for column in columns] for row in rows]
    return HeatMap(name, title, rows, columns, cells, unit, note)


def _part(path: str) -> tuple[str, str]:
    found = re.match(r"((?:.*\.)?\d+)\.(.+)$", path)
    return (found[1], found[2]) if found else ("", path)


def by_number(name: str) -> list[tuple[int, str]]:
    """layers.9 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


class _Scale:
    """From numbers to colours: one hue from 0 or the least on; two around 0 when some numbers are below it."""

    def __init__(self, values: Sequence[float]) -> None:
        low, high = min(values, default=0.0), max(values, default=0.0)
        if low < 0:
            high = max(high, -low)
            low = -high
        self.colours = DIVERGING if low < 0 else SEQUENTIAL
        self.low, self.high = low, high
        self.empty = not values

    def colour(self, value: float) -> tuple[str, str]:
        """Of the cell and of the words in it."""
        span = self.high - self.low
        share = (value - self.low) / span if span > 0 else 0.5
        place = share * (len(self.colours) - 1)
        first = min(int(place), len(self.colours) - 2)
        red, green, blue = (
            round(a + (b - a) * (place - first))
            for a, b in zip(_channels(self.colours[first]), _channels(self.colours[first + 1]), strict=True)
        )
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
        return f"#{red:02x}{green:02x}{blue:02x}", "#fff" if dark else "#222"

    def cell(self, x: float, y: float, width: float, value: float | None) -> str:
        number = _finite(value)
        fill, ink = (MISSING, "#666") if number is None else self.colour(number)
        words = "–" if number is None else _number(number)
        rectangle = f'<rect class="cell" x="{x:.1f}" y="{y}" width="{width}" height="{CELL_HEIGHT}" fill="{fill}"/>'
        return rectangle + text(x + width / 2, y + 14, words, "middle", fill=ink)

    def legend(self, x: float, y: float, unit: str) -> list[str]:
        if self.empty:
            return [text(x, y + 12, "no numbers")]
        low, high = _number(self.low), f"{_number(self.high)} {unit}".rstrip()
        if self.low == self.high:
            return [text(x, y + 12, f"all {high}")]
        start, steps = x + LETTER * len(low) + 8, 32
        width = LEGEND_WIDTH / steps
        bar = [
            f'<rect x="{start + width * step:.1f}" y="{y}" width="{width + 0.5:.1f}" height="14" '
            f'fill="{self.colour(self.low + (self.high - self.low) * step / (steps - 1))[0]}"/>'
            for step in range(steps)
        ]
        return [text(x, y + 12, low), *bar, text(start + LEGEND_WIDTH + 8, y + 12, high)]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _number(value: float) -> str:
    """Short enough for a cell."""
    return f"{value:.3g}" if value != int(value) or abs(value) >= 1e6 else str(int(value))


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
