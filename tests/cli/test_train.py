"""`rankwise train`: files here with no service, and what a recipe gets wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model and a dataset side by side."""
    from tiny_base import sums, write_rows, write_tiny_base

    place = tmp_path_factory.mktemp("training")
    write_tiny_base(place / "tiny")
    write_rows(place / "sums.jsonl", sums())
    return place


RECIPE: dict[str, Any] = {
    "method": "lora",
    "base_model": "tiny",
    "dataset": "sums.jsonl",
    "parameters": {"rank": 4},
    "training": {"steps": 10, "learning_rate": 0.01},
    "evaluation": {"validation_fraction": 0.2},
}


def write_recipe(folder: Path, **changes: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes), encoding="utf-8")
    return path


def test_files_are_trained_here_and_the_report_lies_beside_the_weights(cli: Any, folder: Path, tmp_path: Path) -> None:
    result = cli("train", write_recipe(folder), "-o", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    report = result.json["report"]
    assert report["steps"] == 10
    assert report["evaluation"]["after"]["loss"] < report["evaluation"]["before"]["loss"]
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["adapter_config.json", "adapter_model.safetensors", "loss_curve.svg", "train_report.json"]
    assert json.loads((tmp_path / "out" / "train_report.json").read_text()) == report
    assert "<polyline" in (tmp_path / "out" / "loss_curve.svg").read_text()
    source = {"continue_from": str(tmp_path / "out"), "parameters": {}, "training": {"steps": 1}}
    more = cli("train", write_recipe(folder, **source), "-o", tmp_path / "more", "--json")
    assert more.code == 0, more.err
    assert more.json["report"]["continued_from"]["adapter"] == str(tmp_path / "out")
    assert more.json["report"]["evaluation"]["before"]["loss"] == pytest.approx(report["evaluation"]["after"]["loss"])
    again = cli("train", write_recipe(folder), "-o", tmp_path / "out")
    assert again.code == 1
    assert "is there already and not empty" in again.err


def test_the_report_is_shown_to_people_and_the_pictures_lie_beside_the_weights(
    cli: Any, folder: Path, tmp_path: Path
) -> None:
    parameters = {"target_rank": 1, "increment": 1}
    recipe = write_recipe(folder, method="increlora", parameters=parameters, training={"steps": 2})
    result = cli("train", recipe, "-o", tmp_path / "out")
    assert result.code == 0, result.err
    for words in ("training report: increlora", "on the rows held out", "perplexity", "logits differ by"):
        assert words in result.out
    assert "Rank of every adapted layer" in (tmp_path / "out" / "ranks.svg").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "lara"}, "There is no training method 'lara'"),
        ({"parameters": {"rank": 40}}, "Rank 40 is above 16"),
        ({"parameters": {"target_modules": ["query"]}}, "no linear layer called 'query'"),
        ({"training": {"steps": 2, "epochs": 3}}, "give steps or epochs, not both"),
        ({"speed": 3}, "/speed"),
        ({"base_model": None}, "/base_model"),
        ({"continue_from": "adp_" + "0" * 32}, "goes on from an adapter in a folder"),
    ],
)
def test_a_wrong_recipe_leaves_nothing_behind(
    cli: Any, folder: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    result = cli("train", write_recipe(folder, **changes), "-o", tmp_path / "out")
    assert result.code == 1
    assert words in result.err
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_recipe_is_refused(cli: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for text, words in (("[1, 2]", "is no mapping"), ("a: [", "is not valid YAML")):
        path.write_text(text)
        result = cli("train", path)
        assert (result.code, words in result.err) == (1, True), result.err


def test_a_training_of_files_needs_a_folder_for_its_result(cli: Any, folder: Path) -> None:
    result = cli("train", write_recipe(folder))
    assert result.code == 2
    assert "-o" in result.err
