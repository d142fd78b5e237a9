"""Every entry of the menu of training methods is whole: implementation, parameters in the reference, tests."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from train.catalog import METHODS
from train.protocol import TrainMethod
from train.settings import TASKS, EvaluationSettings, TrainingSettings

SHARED_FILES = {"__init__", "peft_adapter", "changed_base", "own_adapter", "three_factor"}
PAGE = "reference/training.md"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_an_implementation_in_its_own_file(name: str) -> None:
    row = METHODS[name]
    assert row.implementation.startswith(f"train.methods.{name.replace('-', '_')}:")
    method = row.load(row.options())
    assert isinstance(method, TrainMethod)
    assert inspect.getdoc(type(method))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_in_the_reference_with_all_its_parameters(pages: dict[str, str], name: str) -> None:
    section = pages[PAGE].split(f"{{ #{name} }}")[1].split("\n## ")[0]
    for field in METHODS[name].options.model_fields:
        assert f"| `{field}` |" in section
    assert f"| `{name}` |" in pages["how-to/train.md"] or f"`{name}`" in pages["how-to/train.md"]


def test_the_settings_of_every_training_are_in_the_reference(pages: dict[str, str]) -> None:
    for model in (*TASKS.values(), TrainingSettings, EvaluationSettings):
        for field in model.model_fields:
            assert f"| `{field}` |" in pages[PAGE], field


def test_no_implementation_is_off_the_menu(root: Path) -> None:
    files = {path.stem for path in (root / "train" / "methods").glob("*.py")} - SHARED_FILES
    assert files == {name.replace("-", "_") for name in METHODS}
