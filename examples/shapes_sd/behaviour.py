"""What CLoRA does on its way: how far the concepts' maps are apart, and what one branch's adapter changes where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from compose.branches import Seen
from compose.contrastive_loss import class_vectors
from compose.masks import branch_masks
from compose.methods.clora import Clora
from compose.methods.clora_mask_only import CloraMaskOnly
from compose.pipelines import PipelineCache
from examples.shapes_sd.concepts import ADAPTERS, BASE
from examples.shapes_sd.runs import MASK_ONLY, Made, Pair, Row, make, request_of
from examples.shapes_sd.scorer import to_array


@dataclass(frozen=True, slots=True)
class Watched:
    """One step.

    Attributes:
        gap: mean cosine of two maps of one concept, less that of two maps of different concepts.
        overlap: intersection over union of the two concepts' masks.
        coverage: the share of the picture in each concept's mask.
    """

    gap: float
    overlap: float
    coverage: tuple[float, ...]


@contextmanager
def watching() -> Iterator[list[Watched]]:
    """Every step of the compositions made inside, in order."""
    found: list[Watched] = []

    def noting(kept: Any) -> Any:
        def saw(method: CloraMaskOnly, index: int, seen: Seen) -> None:
            kept(method, index, seen)
            found.append(_watched(method, seen))

        return saw

    with (
        mock.patch.object(CloraMaskOnly, "saw", noting(CloraMaskOnly.saw)),
        mock.patch.object(Clora, "saw", noting(Clora.saw)),
    ):
        yield found


def _watched(method: CloraMaskOnly, seen: Seen) -> Watched:
    vectors, labels = class_vectors(seen.maps, method.table.groups)
    unit = torch.nn.functional.normalize(vectors, dim=1)
    cosines, same = unit @ unit.T, labels[:, None] == labels[None, :]
    others = ~torch.eye(len(labels), dtype=torch.bool)
    gap = float(cosines[same & others].mean() - cosines[~same].mean())
    first, second = branch_masks(seen.maps, method.table.mask_tokens, method.grid, method.options)[-2:] > 0
    union = int((first | second).sum())
    overlap = float((first & second).sum()) / union if union else 0.0
    return Watched(gap, overlap, tuple(float(mask.float().mean()) for mask in (first, second)))


def watch(request: Any, wanted: Any, pipelines: PipelineCache, *, flipped: bool = False) -> tuple[Made, list[Watched]]:
    """As `runs.make`, with all steps."""
    with watching() as steps:
        made = make(request, wanted, pipelines, flipped=flipped)
    return made, list(steps)


@dataclass(frozen=True, slots=True)
class Locality:
    """Mean absolute change of the pixels when the square's branch loses its adapter, over all seeds together.

    Attributes:
        own: inside the square's mask and outside the circle's.
        other: inside the circle's mask and outside the square's.
        outside: in neither.
    """

    own: float
    other: float
    outside: float


def locality(
    pair: Pair, seeds: Sequence[int], pipelines: PipelineCache, base: Path = BASE, adapters: Path = ADAPTERS
) -> Locality:
    """Without the update of the latent, which would send the two runs along different ways."""
    bare = Row("", MASK_ONLY.method, MASK_ONLY.parameters, (1.0, 0.0))
    parts: dict[str, list[np.ndarray]] = {"own": [], "other": [], "outside": []}
    for seed in seeds:
        made, without = (
            make(request_of(pair, row, seed, base, adapters), pair.wanted, pipelines).composition
            for row in (MASK_ONLY, bare)
        )
        change = np.abs(to_array(made.image) - to_array(without.image)).mean(axis=-1)
        circle, square = (_half_way(made.masks[noun]) for noun in ("circle", "square"))
        for name, where in (
            ("own", square & ~circle),
            ("other", circle & ~square),
            ("outside", ~(circle | square)),
        ):
            parts[name].append(change[where])
    return Locality(**{name: float(np.concatenate(values).mean()) for name, values in parts.items()})


def _half_way(masks: Sequence[tuple[int, Any]]) -> np.ndarray:
    """The mask after half of the steps, over the pixels."""
    picture = dict(masks)[8]
    return np.asarray(picture) > 127
