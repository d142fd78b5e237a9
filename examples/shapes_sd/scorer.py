"""Says what is in a picture of ShapesSD: components, their shapes and hues. No network."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from examples.shapes_sd.drawing import HUES, KINDS, Pixels, Shape, hue_distance

CONTRAST = 0.25
"""Of any colour channel to the background's, from which a pixel is part of something."""
SMALLEST = 12
MATCH = 0.6
"""Overlap (intersection over union) with its template that makes a component a shape."""
HUE_TOLERANCE = 0.06


@dataclass(frozen=True, slots=True)
class Found:
    """A component.

    Attributes:
        kind: "circle", "square" or "other".
        hue: of the median colour.
        x, y: of its centroid, in pixels.
        pixels: how many it has.
    """

    kind: str
    hue: float
    x: float
    y: float
    pixels: int

    def has_hue(self, hue: float) -> bool:
        return hue_distance(self.hue, hue) <= HUE_TOLERANCE


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a concept looks like."""

    kind: str
    hue: float


@dataclass(frozen=True, slots=True)
class Score:
    """Of one picture with a circle and a square of given hues in it, or not.

    Attributes:
        first, second: there is such a shape.
        both: there are both.
        leak: one concept's shape has the other's hue.
        count_error: there are not exactly two components.
        clean: both, no leak, no count error.
    """

    first: bool
    second: bool
    both: bool
    leak: bool
    count_error: bool
    clean: bool


def to_array(image: Image) -> Pixels:
    """(32, 32, 3) in [0, 1]."""
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def background(picture: Pixels) -> Pixels:
    """(3,), the median colour: shapes cover less than half of a picture."""
    return np.median(picture.reshape(-1, 3), axis=0).astype(np.float32)


def components(picture: Pixels) -> list[Found]:
    """Everything of at least 12 pixels that stands out, in the order in which it is met, row by row."""
    stands_out = (np.abs(picture - background(picture)) > CONTRAST).any(axis=-1)
    labels = label(stands_out)
    found = []
    for number in range(1, int(labels.max()) + 1):
        mask = labels == number
        if mask.sum() >= SMALLEST:
            found.append(_describe(picture, mask))
    return found


def label(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Components that hang together by edges, numbered from 1; 0 elsewhere."""
    labels = np.zeros(mask.shape, dtype=np.int64)
    height, width = mask.shape
    count = 0
    for start in np.argwhere(mask):
        if labels[tuple(start)]:
            continue
        count += 1
        waiting = [(int(start[0]), int(start[1]))]
        while waiting:
            row, column = waiting.pop()
            if not (0 <= row < height and 0 <= column < width) or not mask[row, column] or labels[row, column]:
                continue
            labels[row, column] = count
            waiting += [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    return labels


def _describe(picture: Pixels, mask: NDArray[np.bool_]) -> Found:
    rows, columns = np.nonzero(mask)
    y, x = float(rows.mean() + 0.5), float(columns.mean() + 0.5)
    red, green, blue = np.median(picture[mask], axis=0)
    hue = colorsys.rgb_to_hsv(float(red), float(green), float(blue))[0]
    radius = float(np.sqrt(mask.sum() / np.pi))
    overlaps = {kind: _overlap(mask, Shape(kind, hue, x, y, radius).mask() > 0.5) for kind in KINDS}
    best = max(overlaps, key=overlaps.__getitem__)
    return Found(best if overlaps[best] >= MATCH else "other", hue, x, y, int(mask.sum()))


def _overlap(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    return float((first & second).sum() / (first | second).sum())


def score(picture: Pixels, first: Wanted, second: Wanted) -> Score:
    """Whether both concepts are there, and nothing else."""
    found = components(picture)
    has = [any(item.kind == want.kind and item.has_hue(want.hue) for item in found) for want in (first, second)]
    leak = any(
        item.kind == want.kind and item.has_hue(other.hue)
        for want, other in ((first, second), (second, first))
        for item in found
    )
    both, miscounted = all(has), len(found) != 2
    return Score(has[0], has[1], both, leak, miscounted, both and not leak and not miscounted)


def shares(scores: Iterable[Score]) -> Mapping[str, float]:
    """The mean of each figure."""
    rows = [asdict(item) for item in scores]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


MAGENTA_CIRCLE = Wanted("circle", HUES["magenta"])
GREEN_SQUARE = Wanted("square", HUES["green"])
YELLOW_SQUARE = Wanted("square", HUES["yellow"])
