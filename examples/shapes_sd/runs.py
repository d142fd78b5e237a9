"""The compositions that are compared: a circle and a square by two adapters, from the same noise by every method."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from compose.composition import Composition
from compose.engine import compose
from compose.latent_update import step_size
from compose.pipelines import PipelineCache
from compose.request import CompositionRequest, Concept, Style
from examples.shapes_sd.concepts import ADAPTERS, BASE
from examples.shapes_sd.scorer import GREEN_SQUARE, MAGENTA_CIRCLE, YELLOW_SQUARE, Score, Wanted, score, to_array

PROMPT = "a circle and a square"
STEPS = 16
COMMON: Mapping[str, Any] = {"guidance_scale": 3.0}
MASKS: Mapping[str, Any] = {**COMMON, "mask_threshold": 0.4}
CLORA: Mapping[str, Any] = {
    **MASKS,
    "step_size": 5.0,
    "max_iter_to_alter": 8,
    "iterative_steps": [0, 3, 6],
    "iterative_repeats": 5,
    "gradient_caching": "never",
}


@dataclass(frozen=True, slots=True)
class Pair:
    """Two adapters and what they shall draw. Both pairs share the circle.

    Magenta and green are complementary in the latent space too: what pushes maps apart pushes hues apart, so that a
    green square is no proof of its adapter. Magenta and yellow are not.
    """

    name: str
    square: str
    wanted: Wanted


GREEN = Pair("magenta circle, green square", "green_square", GREEN_SQUARE)
YELLOW = Pair("magenta circle, yellow square", "yellow_square", YELLOW_SQUARE)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table.

    Attributes:
        weights: of the circle's and the square's adapter.
        flipped: the latent is moved uphill.
    """

    name: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[float, float] = (1.0, 1.0)
    flipped: bool = False


NO_LORA = Row("no adapter", "merge", COMMON, (0.0, 0.0))
MERGES = tuple(Row(f"merge, weight {weight}", "merge", COMMON, (weight, weight)) for weight in (1.0, 1.3, 1.6))
SWITCH = Row("switch, τ 4", "switch", {**COMMON, "switch_steps": 4})
COMPOSITE = Row("composite", "composite", COMMON)
FREEFUSE = Row("freefuse", "freefuse", {**MASKS, "mask_steps": 4})
FREEFUSE_ADAPTERS = Row(
    "freefuse, masks by the adapters", "freefuse", {**FREEFUSE.parameters, "masks_from": "adapters"}
)
MASK_ONLY = Row("clora_mask_only", "clora_mask_only", MASKS)
CLORA_ROW = Row("clora", "clora", CLORA)
LEFT = {"left": 0.0, "top": 0.15, "right": 0.5, "bottom": 0.85}
RIGHT = {"left": 0.5, "top": 0.15, "right": 1.0, "bottom": 0.85}
BOXES: Mapping[str, Any] = {**COMMON, "boxes": [LEFT, RIGHT]}
TOLD = (
    FREEFUSE_ADAPTERS,
    Row("omg, a half each", "omg", {**COMMON, "places": [{"boxes": [LEFT]}, {"boxes": [RIGHT]}]}),
    Row("lora_composer, a half each, no update", "lora_composer", {**BOXES, "latent_update": False}),
    Row("lora_composer, a half each, η 3", "lora_composer", {**BOXES, "step_size": 3.0}),
)
METHODS = (NO_LORA, *MERGES, SWITCH, COMPOSITE, FREEFUSE, MASK_ONLY, CLORA_ROW)

AVERAGED = Row("clora: no update, no masks", "clora_mask_only", {**MASKS, "apply_mask_after": STEPS})
UNMASKED = Row("clora: update, no masks", "clora", {**CLORA, "apply_mask_after": STEPS})
FLIPPED = Row("clora: update uphill", "clora", CLORA, flipped=True)
NO_SQUARE = Row("clora: no adapter for the square", "clora", CLORA, (1.0, 0.0))
NO_ADAPTERS = Row("clora: no adapter at all", "clora", CLORA, (0.0, 0.0))
CONTROLS = (AVERAGED, UNMASKED, FLIPPED, NO_SQUARE, NO_ADAPTERS)
HEAVY = tuple(Row(f"{name}, weight 1.6", name, COMMON, (1.6, 1.6)) for name in ("switch", "composite"))


DARK = "dark_ground"
"""The style."""


@dataclass(frozen=True, slots=True)
class Made:
    """An image, what it is worth, and what it took.

    Attributes:
        seconds: of the processor.
    """

    composition: Composition
    score: Score
    seconds: float


def request_of(
    pair: Pair, row: Row, seed: int, base: Path = BASE, adapters: Path = ADAPTERS, *, style: float = 0.0
) -> CompositionRequest:
    """One image; on a dark ground with the weight of the style."""
    concepts = (
        Concept(adapters / "magenta_circle", "magenta_circle", "sks", "circle", row.weights[0]),
        Concept(adapters / pair.square, pair.square, "zwx", "square", row.weights[1]),
    )
    styles = (Style(adapters / DARK, DARK, style),) if style else ()
    return CompositionRequest(
        base, concepts, PROMPT, styles, method=row.method, parameters=row.parameters, seed=seed, steps=STEPS
    )


def make(request: CompositionRequest, wanted: Wanted, pipelines: PipelineCache, *, flipped: bool = False) -> Made:
    """Compose and score."""
    started = time.process_time()
    with uphill() if flipped else _as_it_is():
        made = compose(request, pipelines)
    seconds = time.process_time() - started
    return Made(made, score(to_array(made.image), MAGENTA_CIRCLE, wanted), seconds)


@contextmanager
def uphill() -> Iterator[None]:
    """CLoRA's updates go the wrong way; no request can ask for that."""
    with mock.patch("compose.methods.clora.step_size", lambda *given: -step_size(*given)):
        yield


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield
