"""Parts of a dataset told apart by a column: figures of each, and what the ranks of SMoRA do with each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from artifacts.errors import FileBroken, RequestInvalid
from train.groups import GroupColumn
from train.rank_usage import TaskUsage, Usage, distance, distances, told

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
    return trainings.run("smora", {"rank": 6, "active_rank": 2}, steps=3, rows=ROWS, evaluation=evaluation)[0]


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
