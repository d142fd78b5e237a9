"""The report of a merge against dense matrices, field by field; a comparison repeats it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts.adapter import Adapter
from merge.catalog import parse_parameters
from merge.comparison import Candidate, compare_files
from merge.comparison_report import comparison_report, rank_by
from merge.engine import merge_files
from merge.pictures import MAX_SHOWN, pictures_of_comparison, pictures_of_merge

Pool = list[tuple[Any, Path]]
WEIGHTS = (0.5, -2.0)


@pytest.fixture
def pool(write_adapter: Callable[..., Path], as_input: Callable[..., tuple[Any, Path]]) -> Pool:
    """Two adapters of unequal ranks, whose deltas are far from 1 in size; only one has the last layer."""
    generator = torch.Generator().manual_seed(11)

    def factors(rank: int, size: float) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(rank, 12, generator=generator), size * torch.randn(10, rank, generator=generator)

    one = {"layers.0.q": factors(2, 0.01), "layers.1.q": factors(2, 0.01), "layers.2.q": factors(2, 0.01)}
    two = {"layers.0.q": factors(3, 0.005), "layers.1.q": factors(3, 0.005)}
    sources = [write_adapter("one", one, lora_alpha=4), write_adapter("two", two, lora_alpha=3)]
    return [as_input(source, weight) for source, weight in zip(sources, WEIGHTS, strict=True)]


def deltas_of(pool: Pool) -> list[dict[str, torch.Tensor]]:
    """ΔW of each adapter, dense."""
    found = []
    for _, folder in pool:
        adapter = Adapter.open(folder)
        found.append(
            {path: adapter[path].scaling * adapter[path].B.double() @ adapter[path].A.double() for path in adapter}
        )
    return found


def flat(deltas: dict[str, torch.Tensor], paths: list[str]) -> torch.Tensor:
    zero = torch.zeros(10, 12, dtype=torch.float64)
    return torch.cat([deltas.get(path, zero).flatten() for path in paths])


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one @ other / one.norm() / other.norm())


def table(vectors: list[torch.Tensor]) -> list[Any]:
    return [pytest.approx([cosine(one, other) for other in vectors], rel=1e-4) for one in vectors]


def test_every_figure_is_that_of_dense_matrices(pool: Pool, tmp_path: Path) -> None:
    options = parse_parameters("svd", {"rank": 2, "scale": 3.0, "output_dtype": "float32"})
    report = merge_files(pool, "svd", options, tmp_path / "out").to_dict()
    deltas, merged = deltas_of(pool), Adapter.open(tmp_path / "out")
    paths = sorted(merged)
    exact, result = [], []
    for path, module in zip(paths, report["modules"], strict=True):
        owners = [number for number, item in enumerate(deltas) if path in item]
        there = [deltas[number][path] for number in owners]
        wanted = 3.0 * sum(WEIGHTS[number] * deltas[number][path] for number in owners)
        assert isinstance(wanted, torch.Tensor)
        found = merged[path].scaling * merged[path].B.double() @ merged[path].A.double()
        exact.append(wanted)
        result.append(found)
        assert module == {
            "path": path,
            "rank": 2,
            "padded": 0,
            "owners": owners,
            "energy_kept": pytest.approx(float((found.norm() / wanted.norm()) ** 2), rel=1e-4),
            "relative_error": pytest.approx(float((found - wanted).norm() / wanted.norm()), rel=1e-3, abs=1e-6),
            "interference": table([item.flatten() for item in there]),
            "clusters": None,
            "figures": {},
            "norm_factors": None,
        }
    all_exact, all_found = (torch.cat([item.flatten() for item in items]) for items in (exact, result))
    total = report["total"]
    assert total == {
        "modules": 3,
        "padded_modules": 0,
        "energy_kept": pytest.approx(float((all_found.norm() / all_exact.norm()) ** 2), rel=1e-4),
        "relative_error": pytest.approx(float((all_found - all_exact).norm() / all_exact.norm()), rel=1e-3),
        "interference": table([flat(item, paths) for item in deltas]),
        "clusters": None,
        "figures": {},
    }
    assert 0.05 < total["relative_error"] < 0.95
    assert set(report) == {
        "method", "parameters", "adapters", "rank", "dtype", "compatibility", "warnings", "dropped_modules", "total",
        "reload_check", "rounding_error", "seconds", "modules",
    }  # fmt: skip
    assert (report["method"], report["rank"], report["dtype"]) == ("svd", 2, "F32")
    assert report["parameters"] == options.model_dump(mode="json")
    assert [item["weight"] for item in report["adapters"]] == list(WEIGHTS)
    assert report["reload_check"] == {"passed": True, "largest_relative_error": pytest.approx(0, abs=1e-5)}
    assert report["rounding_error"] == pytest.approx(0, abs=1e-6)
    assert report["dropped_modules"] == []


def test_padding_and_clusters_are_told(pool: Pool, tmp_path: Path) -> None:
    whole = merge_files(pool, "cat", parse_parameters("cat", {}), tmp_path / "cat").to_dict()
    assert [(item["rank"], item["padded"]) for item in whole["modules"]] == [(5, 0), (5, 0), (2, 3)]
    assert whole["total"]["padded_modules"] == 1
    assert whole["total"]["energy_kept"] == pytest.approx(1.0, rel=1e-5)

    pool = [(replace(item, weight=abs(item.weight)), path) for item, path in pool]
    report = merge_files(pool, "lego", parse_parameters("lego", {"rank": 2}), tmp_path / "lego").to_dict()
    clusters = [item["clusters"] for item in report["modules"]]
    for item in clusters:
        assert set(item) == {"inertia", "sizes", "mean_cosine", "agreement", "largest_factor", "capped"}
    known = [item["mean_cosine"] for item in clusters if item["mean_cosine"] is not None]
    assert 0 < len(known) < len(clusters), "in the last layer every cluster has one member"
    assert report["total"]["clusters"] == {
        "mean_cosine": pytest.approx(sum(known) / len(known), rel=1e-5),
        "mean_agreement": pytest.approx(sum(item["agreement"] for item in clusters) / 3, rel=1e-5),
        "largest_factor": pytest.approx(max(item["largest_factor"] for item in clusters), rel=1e-5),
        "capped": sum(item["capped"] for item in clusters),
    }


def test_figures_of_a_method_are_averaged_over_the_layers_that_have_them(pool: Pool, tmp_path: Path) -> None:
    report = merge_files(pool, "model_stock", parse_parameters("model_stock", {}), tmp_path / "out").to_dict()
    figures = [item["figures"] for item in report["modules"]]
    assert [sorted(item) for item in figures[:2]] == [["cosine", "t"]] * 2
    for name in ("cosine", "t"):
        values = [item[name] for item in figures if name in item]
        assert report["total"]["figures"][name] == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_a_comparison_repeats_the_reports_of_its_merges(pool: Pool, tmp_path: Path) -> None:
    wanted = {"small": {"rank": 1}, "large": {"rank": 4}}
    candidates = [Candidate(label, "svd", parse_parameters("svd", given), None) for label, given in wanted.items()]
    compared = compare_files(pool, candidates, tmp_path / "out")
    report = comparison_report(compared, 1.23456)
    first = compared[0].report.to_dict()
    assert set(report) == {
        "adapters", "compatibility", "interference", "candidates", "ranking", "ranked_by", "seconds",
    }  # fmt: skip
    assert report["compatibility"] == first["compatibility"]
    assert report["interference"] == first["total"]["interference"]
    assert report["adapters"] == [
        {"id": item["id"], "name": item["name"], "weight": item["weight"]} for item in first["adapters"]
    ]
    assert (report["ranking"], report["ranked_by"], report["seconds"]) == (["large", "small"], "relative_error", 1.235)
    for item, row in zip(compared, report["candidates"], strict=True):
        alone = item.report.to_dict()
        modules = [
            {name: module[name] for name in ("path", "rank", "energy_kept", "relative_error")}
            for module in alone["modules"]
        ]
        assert row == {
            "label": item.candidate.label,
            "method": "svd",
            "parameters": alone["parameters"],
            "rank": alone["rank"],
            "dtype": alone["dtype"],
            "energy_kept": alone["total"]["energy_kept"],
            "relative_error": alone["total"]["relative_error"],
            "rounding_error": alone["rounding_error"],
            "clusters": None,
            "seconds": alone["seconds"],
            "warnings": alone["warnings"],
            "modules": modules,
        }
    rank_by(report, "accuracy", {"large": 0.2, "small": 0.1})
    assert (report["ranking"], report["ranked_by"]) == (["small", "large"], "accuracy")


def test_a_candidate_without_an_error_comes_last(
    pool: Pool, write_adapter: Callable[..., Path], as_input: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    """The exact weighted sum is zero, where no distance to it can be a share of its size."""
    cut = Candidate("cut", "svd", parse_parameters("svd", {"rank": 1}), None)
    nothing = [as_input(write_adapter("nothing", {"layers.0.q": (torch.ones(2, 12), torch.zeros(10, 2))}))]
    empty = compare_files(nothing, [replace(cut, label="empty")], tmp_path / "zero")
    report = comparison_report([*empty, *compare_files(pool, [cut], tmp_path / "out")], 0.0)
    assert report["ranking"] == ["cut", "empty"]
    assert [row["relative_error"] is None for row in report["candidates"]] == [True, False]
    assert report["candidates"][0]["energy_kept"] is None


def test_pictures_say_what_they_leave_out(pool: Pool, tmp_path: Path) -> None:
    report = merge_files(pool, "svd", parse_parameters("svd", {"rank": 1}), tmp_path / "out").to_dict()
    interference, errors = pictures_of_merge(report)
    assert (interference.name, errors.name) == ("interference", "errors")
    assert interference.rows == interference.columns == ["one", "two"]
    assert interference.values == report["total"]["interference"]
    assert "more adapters" not in interference.note
    assert interference.title == "Cosine between the deltas of the adapters, over all layers"
    assert errors.title == "Relative error of svd against the exact weighted sum, by layer"
    assert interference.note == "1: the same direction. 0: no interference. Below 0: they undo each other."
    assert errors.note == "0: exact. 1: as far away as nothing at all would be."
    assert [round(value, 6) for row in errors.values for value in row if value is not None] == [
        round(module["relative_error"], 6) for module in report["modules"]
    ]

    count = MAX_SHOWN + 3
    long = "x" * 60 + "/the end"
    many = {
        "adapters": [{"id": f"adp_{number}", "name": long if number == 0 else None} for number in range(count)],
        "total": {"interference": [[1.0] * count for _ in range(count)]},
    }
    (picture,) = pictures_of_merge(many)
    assert len(picture.rows) == len(picture.values) == len(picture.values[0]) == MAX_SHOWN
    assert "3 more adapters are not shown" in picture.note
    assert picture.rows[1] == "adp_1", "one without a name is called by its id"
    assert picture.rows[0].startswith("…x")
    assert picture.rows[0].endswith("x/the end")
    assert len(picture.rows[0]) == 40
    assert pictures_of_merge({"adapters": [{"id": "a"}], "total": {"interference": [[1.0]]}}) == []
    assert pictures_of_comparison({"adapters": [], "candidates": []}) == []
