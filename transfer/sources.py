"""Where the inputs of a distillation come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transfer.bench import Bench
from transfer.candidates import Screened
from transfer.labelling import Label

Span = tuple[int, int, float]


@dataclass(frozen=True, slots=True)
class Drawn:
    """The inputs to learn from.

    Attributes:
        kept: by index.
        labels: their answers, if finding the inputs needed them.
        spans: by index, the answer's characters with scores, for a training on selected tokens.
        report: counts and rates.
        unfiltered: texts before the filter, to measure what it does; they stay inside the transfer.
        degraded: fewer inputs were accepted than wanted.
        start: folder of an adapter of the target base that the training goes on from.
    """

    kept: tuple[Screened, ...]
    labels: tuple[Label, ...] | None = None
    spans: Mapping[int, tuple[Span, ...]] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    unfiltered: tuple[str, ...] = ()
    degraded: bool = False
    start: Path | None = None


class PromptSource(ABC):
    """A method that trains: all that distinguishes one from another is where its inputs come from."""

    @abstractmethod
    def draw(self, bench: Bench) -> Drawn:
        """The inputs.

        Raises:
            TransferRefused: something that the method needs was not given.
            TransferStarved: too few were found.
        """
