"""ShapesSD: what the shipped base model and its adapters must do, and what CLoRA must do on them.

The figures are those of docs/explanation/composition.md; gates lie well below them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from examples.shapes_sd.concepts import ADAPTERS, BASE
from examples.shapes_sd.runs import CLORA_ROW, FLIPPED, GREEN, MASK_ONLY, MERGES, NO_ADAPTERS, Row, make, request_of

SEEDS = range(2000, 2032)
FLIPPED_SEEDS, BARE_SEEDS, LOCAL_SEEDS = 24, 12, 24
"""Fewer, of what takes long and shows clearly."""
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


_MADE: dict[tuple[str, int], tuple[Any, Any]] = {}


def _runs(row: Row, count: int) -> list[tuple[Any, Any]]:
    """Score and steps of the first seeds, each made once for all tests."""
    from examples.shapes_sd.behaviour import watch

    for seed in SEEDS[:count]:
        if (row.name, seed) not in _MADE:
            request = request_of(GREEN, row, seed)
            _MADE[row.name, seed] = watch(request, GREEN.wanted, _pipelines(), flipped=row.flipped)
    return [_MADE[row.name, seed] for seed in SEEDS[:count]]


def _share(row: Row, figure: str, count: int = len(SEEDS)) -> float:
    scores = [getattr(made.score, figure) for made, _ in _runs(row, count)]
    return sum(scores) / len(scores)


def _gaps(row: Row, step: int, count: int = len(SEEDS)) -> list[float]:
    return [steps[step].gap for _, steps in _runs(row, count)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_clora_binds_better_than_its_masks_alone_and_cleaner_than_a_merge_of_the_same_weight(gates: Any) -> None:
    if gates.failures:
        pytest.skip("on a base model whose words have no place nothing can be told apart")
    clora = {figure: _share(CLORA_ROW, figure) for figure in ("both", "clean", "leak")}
    assert clora["both"] - _share(MASK_ONLY, "both") >= 0.25
    assert clora["clean"] - _share(MASK_ONLY, "clean") >= 0.25
    assert clora["clean"] - _share(MERGES[0], "clean") >= 0.1
    assert clora["leak"] <= 0.05


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_update_uphill_undoes_it_and_without_adapters_there_is_nothing(gates: Any) -> None:
    if gates.failures:
        pytest.skip("on a base model whose words have no place nothing can be told apart")
    assert _share(FLIPPED, "both", FLIPPED_SEEDS) <= _share(CLORA_ROW, "both") - 0.3
    assert _share(NO_ADAPTERS, "both", BARE_SEEDS) <= 0.2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_update_draws_the_maps_apart() -> None:
    plain, moved = _gaps(MASK_ONLY, 2), _gaps(CLORA_ROW, 2)
    assert _mean(after > before for before, after in zip(plain, moved, strict=True)) >= 0.95
    flipped = _gaps(FLIPPED, 2, FLIPPED_SEEDS)
    assert _mean(after > before for before, after in zip(plain, flipped, strict=False)) <= 0.65
    updates = [made.composition.report["updates"] for made, _ in _runs(CLORA_ROW, len(SEEDS))]
    assert _mean(items[5]["after"] < items[0]["before"] for items in updates) >= 0.95


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_masks_are_of_the_size_of_shapes_and_apart() -> None:
    for step in (2, 4, 8):
        watched = [steps[step] for _, steps in _runs(CLORA_ROW, len(SEEDS))]
        assert _mean(all(0.05 <= share <= 0.4 for share in item.coverage) for item in watched) >= 0.9
        assert _mean(item.overlap for item in watched) <= 0.2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_adapter_acts_inside_its_own_mask() -> None:
    from examples.shapes_sd.behaviour import locality

    found = locality(GREEN, SEEDS[:LOCAL_SEEDS], _pipelines())
    assert found.own >= 2 * found.other
    assert found.outside < found.other


def _mean(values: Any) -> float:
    listed = [float(value) for value in values]
    return sum(listed) / len(listed)
