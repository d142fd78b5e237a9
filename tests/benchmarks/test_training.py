"""The benchmark of the training methods runs, with sizes that say nothing of speed, and knows what is to be reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import training, training_cases
from benchmarks.training_cases import Case, cases
from train.catalog import METHODS, parse_parameters

TIME_GOALS = {
    "allora": 1.15,
    "dylora": 1.05,
    "flexora": 2.2,
    "gradnormlorp": 1.15,
    "increlora": 1.3,
    "bone": 1.0,
    "lora-bert": 1.05,
    "lora-sb": 1.0,
    "lq-lora": 1.6,
    "nlora": 1.1,
}


def test_every_method_of_the_menu_has_lines_with_parameters_that_it_takes() -> None:
    found = cases(16)
    assert {case.method for case in found} == {*METHODS}
    assert len({case.name for case in found}) == len(found)
    for case in found:
        parse_parameters(case.method, case.parameters)
    assert [case.method for case in cases(16, ["vera", "lora"])] == ["lora", "vera"]


def test_a_method_that_is_not_on_the_menu_has_no_line_and_the_goals_are_the_promised_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training_cases, "METHODS", {name: METHODS[name] for name in TIME_GOALS})
    goals: dict[str, Case] = {}
    for case in cases(16):
        goals.setdefault(case.method, case)
    assert {name: case.time_goal for name, case in goals.items()} == TIME_GOALS
    assert {case.memory_goal for case in goals.values() if not case.packed} == {1.1}


def test_an_unknown_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        training.parse(["speed"])
    assert "there is no training method speed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_parts_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "train")
    from tiny_base import write_tiny_base

    base = write_tiny_base(tmp_path / "base")
    sizes = "--rank 4 --rows 2 --length 16 --steps 2 --memory-runs 1 --threads 1"
    training.main(["lora", "allora", "lora-bert", *sizes.split(), "--base", str(base), "--results", str(tmp_path)])
    shown = capsys.readouterr().out
    document: dict[str, Any] = json.loads((tmp_path / "training.json").read_text())
    assert all(figure["name"] in shown for figure in document["figures"])
    named = {figure["name"]: figure for figure in document["figures"]}
    assert named["allora: step time"]["goal"] == 1.15
    assert len(named["allora: step time"]["detail"]["seconds"]) == 2
    assert 0.2 < named["lora: peak memory"]["value"] < 5
    assert named["lora-bert: step time"]["unit"] == "× LoRA, transcripts"
    assert named["stock LoRA, transcripts: peak memory"]["value"] > 0
    assert named["lora-bert, all weights: peak memory"]["value"] > 0
    assert named["lora: peak memory"]["goal"] is None
    assert "our loop beyond a Trainer script" in named
