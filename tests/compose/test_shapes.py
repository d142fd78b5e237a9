"""ShapesSD: what the shipped base model and its adapters must do."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from examples.shapes_sd.concepts import ADAPTERS, BASE
from examples.shapes_sd.runs import CLORA_ROW, GREEN, make, request_of

BYTES = 4_000_000
"""That base model and adapters may have together."""


def test_it_is_small_and_holds_no_pickle() -> None:
    files = [path for folder in (BASE, ADAPTERS) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= BYTES
    assert {path.suffix for path in files} <= {".json", ".safetensors"}


def test_both_concepts_are_composed(pipelines: Any) -> None:
    made = make(request_of(GREEN, CLORA_ROW, 2001), GREEN.wanted, pipelines)
    assert made.composition.image.size == (32, 32)
    assert made.score.clean
    assert not made.composition.report["concept_lost"]


@cache
def _pipelines() -> Any:
    from compose.pipelines import PipelineCache

    return PipelineCache()


@pytest.fixture(scope="module")
def gates() -> Any:
    from examples.shapes_sd.gates import measure

    return measure(_pipelines().get(BASE).pipeline)


@pytest.mark.slow
def test_the_base_model_passes_its_gates(gates: Any) -> None:
    assert gates.failures == []
