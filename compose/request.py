"""What is asked for: adapters, words, sizes. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_STEPS = 50


@dataclass(frozen=True, slots=True)
class Concept:
    """One thing that shall appear, and the adapter that knows it.

    Attributes:
        adapter: a PEFT directory, a folder with one safetensors file, or that file.
        name: what the adapter is called in reports and refusals.
        trigger: the word that the adapter was trained with, such as "sks".
        noun: what it is, as a word of the prompt, such as "dog".
        weight: factor on the adapter's ΔW.
    """

    adapter: Path
    name: str
    trigger: str
    noun: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Style:
    """An adapter that acts on the whole image."""

    adapter: Path
    name: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class CompositionRequest:
    """One image.

    Attributes:
        base: the folder of a StableDiffusionPipeline or StableDiffusionXLPipeline.
        prompt: the scene with every concept's noun in it; triggers may stand before their nouns or be left out.
        parameters: of the method, as its options describe them.
        width, height: pixels; unset, the base model's own.
        steps: of the sampler.
    """

    base: Path
    concepts: tuple[Concept, ...]
    prompt: str
    styles: tuple[Style, ...] = ()
    negative_prompt: str = ""
    method: str = "clora"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    width: int | None = None
    height: int | None = None
    steps: int = DEFAULT_STEPS
