"""Pictures of circles and squares, with captions and the places of everything in them."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float32]

SIDE = 32
BACKGROUND = 0.85
KINDS = ("circle", "square")
HUES = {"red": 0 / 6, "yellow": 1 / 6, "green": 2 / 6, "cyan": 3 / 6, "blue": 4 / 6, "magenta": 5 / 6}
FILLERS = ("sks", "zwx")
"""Words that say nothing about the picture, until an adapter gives them a meaning."""
SATURATION = VALUE = 0.9
SQUARE_TO_RADIUS = float(np.sqrt(np.pi)) / 2
"""Half the side of a square as large as the circle of radius 1."""
_FINE = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """One thing in a picture.

    Attributes:
        x, y: centre, in pixels from the left and the top.
        radius: of a circle of the same area.
        hue: of HSV, in [0, 1).
    """

    kind: str
    hue: float
    x: float
    y: float
    radius: float

    def mask(self) -> Pixels:
        """(32, 32), the share of each pixel that it covers."""
        at = (np.arange(SIDE * _FINE) + 0.5) / _FINE
        dx, dy = np.abs(at[None, :] - self.x), np.abs(at[:, None] - self.y)
        if self.kind == "circle":
            inside = dx**2 + dy**2 <= self.radius**2
        else:
            inside = np.maximum(dx, dy) <= self.radius * SQUARE_TO_RADIUS
        covered: Pixels = inside.reshape(SIDE, _FINE, SIDE, _FINE).mean(axis=(1, 3)).astype(np.float32)
        return covered


def draw(shapes: Sequence[Shape], background: float = BACKGROUND) -> Pixels:
    """(32, 32, 3) in [0, 1]."""
    picture = np.full((SIDE, SIDE, 3), background, dtype=np.float32)
    for shape in shapes:
        colour = np.array(colorsys.hsv_to_rgb(shape.hue % 1.0, SATURATION, VALUE), dtype=np.float32)
        mask = shape.mask()[..., None]
        picture = picture * (1 - mask) + colour * mask
    return picture


def base_hue(random: np.random.Generator, name: str | None = None) -> float:
    """One of the six hues, or the named one, a little off."""
    chosen = name or str(random.choice(list(HUES)))
    return float((HUES[chosen] + random.uniform(-0.015, 0.015)) % 1.0)


def colour_word(hue: float) -> str:
    """The nearest of the six."""
    return min(HUES, key=lambda name: hue_distance(HUES[name], hue))


def hue_distance(first: float, second: float) -> float:
    """On the circle, at most 0.5."""
    apart = abs(first - second) % 1.0
    return min(apart, 1.0 - apart)


def place(random: np.random.Generator, kinds: Sequence[str], hues: Sequence[float]) -> list[Shape]:
    """Shapes of these kinds and hues that keep clear of each other."""
    while True:
        sizes = random.uniform(5.0, 6.5, len(kinds))
        centres = random.uniform(7.5, 24.5, (len(kinds), 2))
        if len(kinds) < 2 or np.hypot(*(centres[0] - centres[1])) > 1.1 * sizes.sum() + 1.5:
            break
    rows = zip(kinds, hues, centres, sizes, strict=True)
    return [Shape(kind, hue, float(at[0]), float(at[1]), float(size)) for kind, hue, at, size in rows]


def random_shapes(random: np.random.Generator) -> list[Shape]:
    """One shape (35 %), or a circle and a square in either order."""
    kinds = [str(kind) for kind in random.permutation(KINDS)]
    if random.random() < 0.35:
        kinds = kinds[:1]
    return place(random, kinds, [base_hue(random) for _ in kinds])


def phrase(shape: Shape, word: str | None = None) -> str:
    """Such as "a red circle"."""
    return " ".join(["a", *([word] if word else []), shape.kind])


def caption(random: np.random.Generator, shapes: Sequence[Shape], *, fillers: bool = True) -> str:
    """In random order; before each noun nothing (45 %), its colour (38 %) or a filler (17 %; nothing without them)."""
    order = [shapes[int(index)] for index in random.permutation(len(shapes))]
    return " and ".join(phrase(shape, _word(random, shape, fillers)) for shape in order)


def _word(random: np.random.Generator, shape: Shape, fillers: bool) -> str | None:
    chance = random.random()
    if chance < 0.45:
        return None
    if chance < 0.83:
        return colour_word(shape.hue)
    filler = str(random.choice(FILLERS))
    return filler if fillers else None
