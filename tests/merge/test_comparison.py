"""Several merges of one pool: each is what it would be alone, and what they share is done once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts.adapter import Adapter
from artifacts.errors import MergeRefused
from artifacts.heat_map import HeatMap
from merge import stack as stack_module
from merge.catalog import parse_parameters
from merge.comparison import Candidate, compare_files
from merge.comparison_report import comparison_report, rank_by
from merge.core import CoreFrame
from merge.engine import merge_files
from merge.pictures import pictures_of_comparison, pictures_of_merge
from merge.reload import Probe
from merge.stack import Stack

Pool = list[tuple[Any, Path]]
CANDIDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "cat": ("cat", {}),
    "mean": ("cat", {"normalize": True}),
    "negative mean": ("svd", {"rank": 3, "normalize": True, "scale": -1.0}),
    "common": ("svd", {"rank": 2, "missing_modules": "intersection"}),
    "exact": ("linear", {"compute_dtype": "float64"}),
    "lego": ("lego", {"rank": 3, "seed": 5}),
}
SHARING: dict[str, tuple[str, dict[str, Any]]] = {
    "least": ("svd", {"rank": 1}),
    "more": ("svd", {"rank": 4}),
    "as much": ("linear", {"rank": 4}),
    "in halves": ("svd", {"rank": 4, "output_dtype": "float16"}),
    "padded": ("svd", {"rank": 9, "output_dtype": "bfloat16"}),
    "doubled": ("svd", {"rank": 2, "scale": 2.0}),
    "separated": ("tsv_m", {"rank": 3}),
    "equal": ("iso_c", {"rank": 3}),
    "on a grid": ("core_space", {"rank": 3, "rule": "ties"}),
    "knotted": ("knots", {"rank": 3}),
}


@pytest.fixture
def pool(write_adapter: Callable[..., Path], as_input: Callable[..., tuple[Any, Path]]) -> Pool:
    """Three adapters of unequal ranks, of which the last lacks a module; two share components."""
    generator = torch.Generator().manual_seed(3)

    def factors(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(rank, 12, generator=generator), torch.randn(10, rank, generator=generator)

    shared = factors(2)
    first = write_adapter("first", {"layers.0.q": shared, "layers.1.q": factors(2)}, lora_alpha=6)
    second = write_adapter("second", {"layers.0.q": shared, "layers.1.q": factors(2)}, lora_alpha=6)
    third = write_adapter("third", {"layers.1.q": factors(3)}, lora_alpha=2)
    return [as_input(first, 0.5), as_input(second, 2.0), as_input(third, -1.0 / 3)]


@pytest.fixture
def wide(write_adapter: Callable[..., Path], as_input: Callable[..., tuple[Any, Path]]) -> Pool:
    """Two adapters with sides that are no multiple of anything, and more components than a Gram matrix has blocks."""
    generator = torch.Generator().manual_seed(4)

    def written(name: str) -> Path:
        return write_adapter(
            name, {"layers.0.q": (torch.randn(24, 77, generator=generator), torch.randn(45, 24, generator=generator))}
        )

    return [as_input(written("wide-1"), 0.5), as_input(written("wide-2"), 2.0)]


def positive(pool: Pool) -> Pool:
    return [(replace(item, weight=abs(item.weight)), path) for item, path in pool]


def candidates(lineage: Any = None, of: Any = CANDIDATES) -> list[Candidate]:
    return [
        Candidate(label, method, parse_parameters(method, parameters), lineage)
        for label, (method, parameters) in of.items()
    ]


@pytest.mark.parametrize("of", [CANDIDATES, SHARING], ids=["small", "what shares"])
def test_every_candidate_is_byte_for_byte_the_merge_alone(of: Any, pool: Pool, wide: Pool, tmp_path: Path) -> None:
    pool = positive(pool if of is CANDIDATES else wide)
    compared = compare_files(pool, candidates({"a": 1}, of), tmp_path / "compared")
    assert [item.candidate.label for item in compared] == list(of)
    for item in compared:
        alone = tmp_path / item.candidate.label
        report = merge_files(pool, item.candidate.method, item.candidate.options, alone, lineage={"a": 1})
        for path in alone.iterdir():
            assert (item.directory / path.name).read_bytes() == path.read_bytes(), (item.candidate.label, path.name)
        assert {**report.to_dict(), "seconds": 0} == {**item.report.to_dict(), "seconds": 0}


def test_what_is_the_same_is_cast_and_probed_once(wide: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[tuple[str, int, torch.dtype]] = []
    original = Probe.of

    def counted(path: str, A: Any, B: Any, cast_A: Any, cast_B: Any) -> Probe:
        probed.append((path, len(cast_A), cast_A.dtype))
        return original(path, A, B, cast_A, cast_B)

    monkeypatch.setattr(Probe, "of", counted)
    chosen = [item for item in candidates(of=SHARING) if item.label in ("least", "more", "as much", "in halves")]
    compare_files(wide, chosen, tmp_path / "compared")
    assert probed == [
        ("layers.0.q", 4, torch.float32),
        ("layers.0.q", 4, torch.float16),
        ("layers.0.q", 1, torch.float32),
    ]


def test_the_sum_under_other_weights_has_one_svd_too(
    wide: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[float]] = []
    original = stack_module.small_svd

    def counted(core: torch.Tensor) -> Any:
        result = original(core)
        found.append(result.S[:1].tolist())
        return result

    monkeypatch.setattr(stack_module, "small_svd", counted)
    options = [{"rank": 4}, {"rank": 3, "normalize": True}, {"rank": 2, "normalize": True}]
    chosen = [Candidate(str(given), "svd", parse_parameters("svd", given)) for given in options]
    compare_files(wide, chosen, tmp_path / "compared")
    # the weights sum up to 2.5
    (first,), (second,) = sorted(found)
    assert second == pytest.approx(2.5 * first, rel=1e-5)


def test_negative_weights_that_are_normalised_order_equal_components_anew(pool: Pool, tmp_path: Path) -> None:
    chosen = [item for item in candidates() if item.method in ("cat", "svd")]
    # They share components, so that only the weights order these; a negative sum turns that order round.
    flipped = [(replace(item, weight=weight), path) for (item, path), weight in zip(pool, (1.0, -3.0), strict=False)]
    compared = compare_files(flipped, chosen, tmp_path / "compared")
    for item in compared:
        alone = tmp_path / item.candidate.label
        merge_files(flipped, item.candidate.method, item.candidate.options, alone)
        weights = "adapter_model.safetensors"
        assert (item.directory / weights).read_bytes() == (alone / weights).read_bytes(), item.candidate.label


def test_modules_are_read_once_for_each_precision(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, torch.dtype]] = []
    original = Stack.load.__func__  # type: ignore[attr-defined]

    def counted(cls: Any, module: Any, adapters: Any, weights: Any, dtype: torch.dtype, device: Any) -> Stack:
        read.append((module.path, dtype))
        return original(cls, module, adapters, weights, dtype, device)  # type: ignore[no-any-return]

    monkeypatch.setattr(Stack, "load", classmethod(counted))
    compare_files(positive(pool), candidates(), tmp_path / "compared")
    single, double = torch.float32, torch.float64
    paths = ("layers.0.q", "layers.1.q")
    assert sorted(read, key=str) == sorted(((path, dtype) for path in paths for dtype in (single, double)), key=str)


def test_inner_products_are_computed_once(stack_of: Any) -> None:
    stack = stack_of([(torch.randn(2, 6), torch.randn(5, 2), 1.0) for _ in range(2)]).ordered()
    gram_A, gram_B = stack.gram_A, stack.gram_B
    other = stack.reweighted([0.5, -2.0])
    assert (other.A is stack.A, other.gram_A is gram_A, other.gram_B is gram_B) == (True, True, True)
    bare = stack.bare()
    assert (bare.gram_A is gram_A, bare.gram_B is gram_B, bare.A is stack.A) == (True, True, True)
    assert stack.reweighted([1.0, 1.0]) is stack
    # nor do the bases depend on weights; the SVD of the sum does
    core, bases = stack.core, (stack.triangular_A, stack.triangular_B)
    weighed = stack.reweighted([0.5, -2.0])
    assert (weighed.triangular_A is bases[0], weighed.triangular_B is bases[1]) == (True, True)
    assert not torch.allclose(weighed.core.S, core.S)
    assert CoreFrame.of(stack, "none").weighted_sum() is core
    assert sorted(other.weights.tolist()) == [-2.0, -2.0, 0.5, 0.5]


def test_the_report_ranks_by_the_distance_to_the_exact_sum(pool: Pool, tmp_path: Path) -> None:
    compared = compare_files(positive(pool), candidates(), tmp_path / "compared")
    report = comparison_report(compared, 1.5)
    rows = {row["label"]: row for row in report["candidates"]}
    errors = [rows[label]["relative_error"] for label in report["ranking"]]
    assert errors == sorted(errors)
    assert set(report["ranking"][:3]) == {"cat", "mean", "exact"}
    assert max(errors[:3]) < 1e-6 < errors[3]
    assert [item["weight"] for item in report["adapters"]] == [0.5, 2.0, 1 / 3]
    cosines = report["interference"]
    assert [cosines[i][i] for i in range(3)] == pytest.approx([1, 1, 1])
    assert cosines[0][1] == cosines[1][0]
    assert rows["common"]["warnings"]
    assert {module["path"] for module in rows["common"]["modules"]} == {"layers.1.q"}
    names = [picture.name for picture in pictures_of_comparison(report)]
    assert names == ["interference", "errors"]
    errors_picture = pictures_of_comparison(report)[1]
    assert isinstance(errors_picture, HeatMap)
    assert errors_picture.title == "Relative error against the exact weighted sum, by layer and candidate"
    assert errors_picture.note == "0: exact. 1: as far away as nothing at all would be."
    assert errors_picture.rows == ["layers.0.q", "layers.1.q"]
    assert errors_picture.columns == list(CANDIDATES)
    assert errors_picture.values[0][3] is None  # of `common`, which has no such layer
    assert errors_picture.draw().startswith("<svg")


def test_a_comparison_of_one(pool: Pool, tmp_path: Path) -> None:
    (one,) = compare_files(positive(pool), candidates()[:1], tmp_path / "compared")
    report = comparison_report([one], 1.23456)
    assert (report["compatibility"], report["ranking"], report["seconds"]) == ("shape", ["cat"], 1.235)
    assert report["interference"] == one.report.totals()["interference"]


def test_another_order_leaves_out_who_has_no_number() -> None:
    report: dict[str, Any] = {"ranking": ["a", "b", "c", "d"], "ranked_by": "relative_error"}
    rank_by(report, "loss", {"d": 2.0, "a": 2.0, "c": -1.0, "of another": 0.0})
    assert report == {"ranking": ["c", "a", "d"], "ranked_by": "loss"}


def test_a_merge_of_one_adapter_has_no_interference_to_show(pool: Pool, tmp_path: Path) -> None:
    report = merge_files(pool[:1], "cat", parse_parameters("cat", {}), tmp_path / "one").to_dict()
    assert [picture.name for picture in pictures_of_merge(report)] == ["errors"]
    both = merge_files(pool[:2], "svd", parse_parameters("svd", {"rank": 1}), tmp_path / "two").to_dict()
    interference, errors = pictures_of_merge(both)
    assert interference.values[0][0] == pytest.approx(1)
    assert errors.values == [[pytest.approx(module["relative_error"])] for module in both["modules"]]


def test_broken_numbers_refuse_the_whole_comparison(
    write_adapter: Callable[..., Path], as_input: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    A = torch.ones(1, 4)
    A[0, 1] = float("nan")
    broken = as_input(write_adapter("broken", {"q": (A, torch.ones(3, 1))}))
    with pytest.raises(MergeRefused, match="NaN"):
        compare_files([broken], [c for c in candidates() if c.label == "cat"], tmp_path / "compared")
    assert not list((tmp_path / "compared" / "0").iterdir())


def test_the_results_are_adapters(pool: Pool, tmp_path: Path) -> None:
    compared = compare_files(positive(pool), candidates()[:1], tmp_path / "compared")
    assert set(Adapter.open(compared[0].directory)) == {"layers.0.q", "layers.1.q"}
