from __future__ import annotations

import pytest

from examples.smollm2.merge_table import candidates, main, markdown
from merge.catalog import METHODS, parse_parameters


def test_every_method_has_a_row_and_every_rule_of_a_method_one_of_its_own() -> None:
    found = candidates(list(METHODS))
    assert {item.method for item in found} == set(METHODS)
    assert len({item.label for item in found}) == len(found)
    rules = [item for item in found if item.method == "pico"]
    assert [item.label for item in rules] == ["pico sum", "pico ties", "pico tsv"]
    assert [item.options for item in rules] == [
        parse_parameters("pico", {"rule": rule}) for rule in ("sum", "ties", "tsv")
    ]
    (plain,) = (item for item in found if item.method == "svd")
    assert (plain.label, plain.options) == ("svd", parse_parameters("svd", {}))


def test_the_table_has_the_best_mean_first_below_what_was_not_merged() -> None:
    rows = [
        {"method": "base model", "dates": 0.0, "orders": 0.0, "mean": 0.0},
        {"method": "low", "rank": 16, "error": 0.25, "dates": 0.5, "orders": 0.25, "mean": 0.375, "seconds": 1.25},
        {"method": "high", "rank": 8, "error": 1e-15, "dates": 1.0, "orders": 0.5, "mean": 0.75, "seconds": 0.5},
    ]
    lines = markdown(rows).splitlines()
    assert lines == [
        "| method | rank | error | dates | orders | mean | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| base model |  |  | 0.0% | 0.0% | 0.0% |  |",
        "| high | 8 | 1e-15 | 100.0% | 50.0% | 75.0% | 0.5 |",
        "| low | 16 | 0.25 | 50.0% | 25.0% | 37.5% | 1.2 |",
    ]


def test_a_method_that_does_not_exist_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--methods", "magic"])
    assert "magic" in capsys.readouterr().err
