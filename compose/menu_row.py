"""What the menu of composition methods says of one method. Imports no torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compose.options.common import MAX_CONCEPTS, ComposeOptions

if TYPE_CHECKING:
    from compose.protocol import CompositionMethod


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a method takes and gives.

    Attributes:
        yields: an image, or an adapter that then makes images.
        styles: it takes style adapters.
        masks: it gives the mask of each concept.
        maximum_concepts: the most that it takes.
    """

    yields: Literal["image", "adapter"] = "image"
    styles: bool = True
    masks: bool = False
    maximum_concepts: int = MAX_CONCEPTS


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the menu. `implementation` is imported in a worker only.

    Attributes:
        when: when to take it rather than another, whole sentences.
        cost: time beside a plain generation of the same steps.
    """

    name: str
    title: str
    summary: str
    when: str
    cost: str
    options: type[ComposeOptions]
    implementation: str
    arxiv: str | None
    reference_url: str
    capabilities: Capabilities

    def load(self) -> type[CompositionMethod]:
        """Import the implementation (torch)."""
        module, _, name = self.implementation.partition(":")
        found: type[CompositionMethod] = getattr(importlib.import_module(module), name)
        return found
