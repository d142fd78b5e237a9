"""Parts of a dataset told apart by a column: figures of each, and what the ranks of SMoRA do with each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_base import write_rows
from torch import nn

from artifacts.errors import FileBroken, RequestInvalid
from artifacts.intake import inspect
from train.base_files import BaseFiles
from train.data import DataFile
from train.groups import GroupColumn
from train.measurement import Measurement
from train.measurement_settings import MeasurementSettings
from train.methods.smora import FOLD_KEY
from train.rank_usage import TaskUsage, Usage, distance, distances, told
from train.smora_layer import Shape, SmoraLinear
from train.splits import split_of

ROWS = [
    {"prompt": f"{kind} {number} is ", "completion": str(number + (1 if kind == "after" else -1)), "task": kind}
    for number in range(10, 40)
    for kind in ("after", "before")
]


def test_rows_without_a_group_and_too_many_groups_are_told() -> None:
    column = GroupColumn("task")
    for number, value in enumerate(("a", 7, None, True, "", 1.5, "x" * 101), 1):
        column.see(number, {"task": value})
    with pytest.raises(FileBroken) as caught:
        column.of([1, 2])
    assert [error.pointer for error in caught.value.errors] == [f"row {number}" for number in range(3, 8)]
    fine = GroupColumn("task")
    for number in range(51):
        fine.see(number, {"task": number % 50})
    assert fine.of([0, 49, 50]) == ("0", "49", "0")
    fine.see(51, {"task": "one more"})
    with pytest.raises(RequestInvalid) as refused:
        fine.of([0])
    assert refused.value.errors[0].pointer == "/evaluation/group_column"


@pytest.fixture(scope="module")
def grouped(tiny_base: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from trainings import Trainings

    trainings = Trainings(tmp_path_factory.mktemp("groups"), tiny_base)
    evaluation = {"validation_fraction": 0.3, "group_column": "task"}
    parameters = {"rank": 6, "active_rank": 2, "fold": "per_task"}
    return trainings.run("smora", parameters, steps=6, rows=ROWS, evaluation=evaluation)[0]


@pytest.fixture(scope="module")
def base(tiny_base: Any) -> BaseFiles:
    return BaseFiles("acme/tiny", str(tiny_base))


def test_every_task_gets_a_plain_lora_that_loses_what_it_says(grouped: Any, base: BaseFiles, tmp_path: Path) -> None:
    found = grouped.own["evaluation"]
    assert [fold["task"] for fold in found["folds"]] == ["after", "before"]
    assert found["without_validation_rows"] == []
    for fold, beside in zip(found["folds"], grouped.beside, strict=True):
        own = grouped.evaluation["groups"][fold["task"]]["after"]["loss"]
        assert fold["smora_figures"]["loss"] == pytest.approx(own, rel=1e-4)
        assert fold["loss_gap"] == pytest.approx(fold["figures"]["loss"] - fold["smora_figures"]["loss"])
        assert 0 < abs(fold["loss_gap"]) < 1
        manifest = inspect(beside.directory)
        assert (manifest.method, manifest.mergeable) == ("lora", True)
        held_out = [row for row in ROWS if row["task"] == fold["task"] and split_of(row, 0.3) == "validation"]
        rows = write_rows(tmp_path / f"{fold['task']}.jsonl", held_out)
        measured = Measurement(
            base, [DataFile(rows, "jsonl")], MeasurementSettings(), "cpu", tmp_path, lambda _done, _all: None
        )
        assert measured.of(beside.directory)["figures"]["loss"] == pytest.approx(fold["figures"]["loss"], rel=1e-4)
        with safe_open(beside.directory / "adapter_model.safetensors", "pt") as file:
            assert json.loads(file.metadata()[FOLD_KEY]) == fold


def test_with_all_ranks_and_a_constant_router_folding_loses_nothing() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = SmoraLinear(nn.Linear(7, 5), Shape(4, 4, 6.0))
        layer.lora_B.data.normal_()
        layer.lora_router.data.zero_()
        x = torch.randn(9, 7)
    folded = layer.folded(torch.ones(4))
    torch.testing.assert_close(layer.adapter(x), folded.scaling * x @ folded.A.T @ folded.B.T, rtol=0, atol=1e-5)
    less = layer.folded(torch.tensor([0.0, 2.0, 0.0, 2.0]))
    assert torch.equal(less.A, layer.lora_A[[1, 3]])
    assert torch.equal(less.B, 3.0 * layer.lora_B[:, [1, 3]])


def test_the_figures_of_the_groups_make_up_those_of_all_rows(grouped: Any) -> None:
    found = grouped.evaluation["groups"]
    assert list(found) == ["after", "before"]
    assert sum(group["rows"] for group in found.values()) == grouped.data["validation_rows"]
    # every completion has as many tokens: the loss of all is the mean of the groups by their rows
    for when in ("before", "after"):
        mean = sum(group["rows"] * group[when]["loss"] for group in found.values()) / grouped.data["validation_rows"]
        assert mean == pytest.approx(grouped.evaluation[when]["loss"], rel=1e-6)
    assert found["after"]["before"]["loss"] != found["before"]["before"]["loss"]
    for group in found.values():
        assert group["difference"]["loss"] == pytest.approx(group["after"]["loss"] - group["before"]["loss"])


def test_the_report_tells_how_the_tasks_use_the_ranks(grouped: Any) -> None:
    usage = grouped.own["usage"]
    assert usage["tokens"].keys() == {"after", "before"}
    assert 0 < usage["mean_distance"] <= usage["largest_distance"] <= 1
    (pair,) = usage["between"]
    assert pair["distance"] == pytest.approx(usage["mean_distance"])
    first, second = grouped.own["pictures"]
    assert (first["name"], second["name"]) == ("rank-usage", "task-distance")
    assert (first["rows"], len(first["columns"])) == (["after", "before"], 6)
    for row in first["values"]:
        assert sum(row) == pytest.approx(200, abs=0.6)  # two of six ranks, in %


def test_packed_rows_are_measured_by_group_and_used_as_one(tiny_base: Any, tmp_path: Any) -> None:
    from trainings import Trainings

    report = Trainings(tmp_path, tiny_base).run(
        "smora",
        {"rank": 6, "active_rank": 2, "target_modules": ["q_proj"]},
        steps=1,
        rows=ROWS,
        task={"packing": True, "max_length": 64},
        evaluation={"validation_fraction": 0.3, "group_column": "task", "max_rows": 7},
    )[0]
    assert sum(group["rows"] for group in report.evaluation["groups"].values()) == 7
    assert report.own["usage"]["tokens"].keys() == {"all rows"}


def test_the_distance_of_two_histograms() -> None:
    one, other = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 1.0, 1.0])
    assert distance(one, one * 3) == 0
    assert distance(one, other) == pytest.approx(0.5)
    assert distance(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])) == 1
    tasks = {
        name: TaskUsage(9, {"model.layers.0.q_proj": Usage(shares, shares)})
        for name, shares in (("a", one), ("b", other), ("c", one))
    }
    assert distances(tasks) == {"model.layers.0.q_proj": pytest.approx(1 / 3)}
    assert told(tasks)["usage"]["largest_in"] == "model.layers.0.q_proj"
    assert told({}) == {}
