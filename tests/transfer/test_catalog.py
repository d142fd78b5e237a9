"""The menu: every row has what it names, and nothing of it imports torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from artifacts.errors import RequestInvalid
from transfer.catalog import METHODS, find_method, parse_parameters
from transfer.options import DistilOptions, TransLoraOptions, WeightOptions


@pytest.mark.parametrize("name", list(METHODS))
def test_every_row_has_an_implementation_in_its_own_file_and_described_options(name: str) -> None:
    row = METHODS[name]
    assert row.name == name
    assert all(part.strip().endswith(".") for part in (row.summary, row.when, row.cost))
    assert row.implementation.startswith(f"transfer.methods.{name.replace('-', '_')}:")
    assert row.load().__doc__
    assert all(field.description for field in row.options.model_fields.values())
    assert issubclass(row.options, DistilOptions if row.capabilities.trains else WeightOptions)
    row.options()


@pytest.mark.parametrize(
    ("parameters", "pointer"),
    [
        ({"nonsense": 1}, "/parameters/nonsense"),
        ({"rows": 15}, "/parameters/rows"),
        ({"rows": 100, "max_candidates": 99}, "/parameters"),
        ({"filter": "excess", "rows": 100, "max_candidates": 150}, "/parameters"),
        ({"filter": "excess", "grow_seeds": True}, "/parameters"),
        ({"filter": "none", "grow_seeds": True}, "/parameters"),
        ({"threshold": float("inf")}, "/parameters/threshold"),
        ({"held_out": 16, "rows": 16}, "/parameters"),
        ({"training": {"early_stopping": {}}}, "/parameters"),
        ({"temperature": 0}, "/parameters/temperature"),
        ({"target_method": "nonsense"}, "/parameters/target_method"),
        ({"target_parameters": {"rank": 0}}, "/parameters/target_parameters/rank"),
    ],
)
def test_parameters_out_of_range_are_refused_with_pointers(parameters: dict[str, object], pointer: str) -> None:
    with pytest.raises(RequestInvalid) as refused:
        parse_parameters("trans-lora", parameters)
    assert pointer in {item.pointer for item in refused.value.errors}


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(RequestInvalid, match="no transfer method 'nonsense'"):
        find_method("nonsense")


def test_defaults_follow_from_one_another() -> None:
    options = parse_parameters("trans-lora", {"rows": 50})
    assert isinstance(options, TransLoraOptions)
    assert (options.candidates, options.ranked, options.cut) == (1000, 100, 0.0)
    other = parse_parameters("trans-lora", {"filter": "tuneshift_kd"})
    assert isinstance(other, TransLoraOptions)
    assert other.cut == 1.5
    assert other.train_options(("q",)).target_modules == ["q"]
    named = TransLoraOptions(target_parameters={"target_modules": ["x"]})
    assert named.train_options(("q",)).target_modules == ["x"]


def test_the_menu_imports_no_torch() -> None:
    code = "import sys, transfer.catalog, transfer.stage_files, transfer.gate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
