"""What can be said of a request before any model is loaded. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from artifacts.errors import ComposeRefused, FieldError
from compose.catalog import find_method, parse_parameters
from compose.options.common import MAX_STEPS, MAX_STYLE_WEIGHT, ComposeOptions
from compose.prompts import ScenePrompts, scene_prompts
from compose.request import CompositionRequest

MAX_WEIGHT = 10.0
MAX_SIDE = 4096


@dataclass(frozen=True, slots=True)
class Validated:
    """A request without a fault that can be seen from outside."""

    options: ComposeOptions
    prompts: ScenePrompts
    warnings: tuple[str, ...]


def validate(request: CompositionRequest, yields: Literal["image", "adapter"] = "image") -> Validated:
    """Check names, numbers and words.

    Args:
        yields: what the method must give.

    Raises:
        RequestInvalid: unknown method, or a parameter that it does not take.
        ComposeRefused: anything else, with a JSON pointer for each finding.
    """
    row = find_method(request.method)
    if row.capabilities.yields != yields:
        message = f"{row.name} yields an {row.capabilities.yields}, not an {yields}"
        raise ComposeRefused(f"Method {message}.", errors=[FieldError("/method", message)])
    options = parse_parameters(request.method, request.parameters)
    found = [*_numbers(request), *_counts(request, options), *options.problems(request)]
    if request.styles and not row.capabilities.styles:
        found.append(FieldError("/styles", f"method {row.name!r} takes no styles"))
    if found:
        raise ComposeRefused(f"{found[0].pointer}: {found[0].message}.", errors=found)
    prompts = scene_prompts(request.prompt, request.concepts)
    return Validated(options, prompts, (*options.warnings(request), *_warnings(request)))


def _numbers(request: CompositionRequest) -> list[FieldError]:
    found = []
    if not 1 <= request.steps <= MAX_STEPS:
        found.append(FieldError("/steps", f"must be from 1 to {MAX_STEPS}"))
    if not -(2**63) <= request.seed < 2**63:
        found.append(FieldError("/seed", "must be a whole number of 64 bits"))
    for name in ("width", "height"):
        side = getattr(request, name)
        if side is not None and not 0 < side <= MAX_SIDE:
            found.append(FieldError(f"/{name}", f"must be from 1 to {MAX_SIDE}"))
    for index, concept in enumerate(request.concepts):
        if not math.isfinite(concept.weight) or abs(concept.weight) > MAX_WEIGHT:
            found.append(FieldError(f"/concepts/{index}/weight", f"must be from −{MAX_WEIGHT:g} to {MAX_WEIGHT:g}"))
        if not concept.noun.strip():
            found.append(FieldError(f"/concepts/{index}/noun", "must name what the concept is"))
    for index, style in enumerate(request.styles):
        if not 0 <= style.weight <= MAX_STYLE_WEIGHT:
            found.append(FieldError(f"/styles/{index}/weight", f"must be from 0 to {MAX_STYLE_WEIGHT:g}"))
    return found


def _counts(request: CompositionRequest, options: ComposeOptions) -> list[FieldError]:
    count = len(request.concepts)
    most = find_method(request.method).capabilities.maximum_concepts
    if count < options.minimum_concepts:
        hint = "; for one concept take the method merge" if count == 1 else ""
        return [
            FieldError("/concepts", f"{request.method} needs at least {options.minimum_concepts}, not {count}{hint}")
        ]
    if count > most:
        return [FieldError("/concepts", f"{request.method} takes at most {most}, not {count}")]
    return []


def _warnings(request: CompositionRequest) -> list[str]:
    nouns = [concept.noun.lower() for concept in request.concepts]
    twice = sorted({noun for noun in nouns if nouns.count(noun) > 1})
    return [
        f"Several concepts are called {noun!r}: they share their word's attention and often come out as one."
        for noun in twice
    ]
