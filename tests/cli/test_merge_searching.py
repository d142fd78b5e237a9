"""`rankwise merge-search`: what its options ask for, and how the report of a search is printed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import app.cli.program as program
from app.cli import reports
from app.cli.output import stdout

IDS = ("adp_" + "a" * 32, "adp_" + "b" * 32)


@pytest.fixture
def posted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command sends, by the path that it is sent to."""
    sent: dict[str, Any] = {}

    class Sent:
        def __init__(self, *_: object) -> None: ...

        def __enter__(self) -> Sent:
            return self

        def __exit__(self, *_: object) -> None: ...

        def post(self, path: str, document: Any) -> dict[str, Any]:
            sent[path] = document
            return {"id": "job_1", "kind": "merge", "state": "queued"}

    monkeypatch.setattr(program, "Client", Sent)
    return sent


def test_options_become_ranges_choices_and_a_budget(cli: Callable[..., Any], posted: dict[str, Any]) -> None:
    methods = ("--method", "svd", "--method", "core_space:density=0.1..0.9;rule=ties|tsv;seed=3")
    budget = ("--trials", 30, "--seconds", 600, "--seed", 7, "--weights", "0.2..1.5", "--ranks", "8|r")
    data = ("--dataset", "dat_1", "--dataset", "dat_2", "--metric", "exact_match", "--max-rows", 50)
    result = cli(
        "merge-search", *IDS, *methods, *budget, *data, "--weight", f"{IDS[1]}=0.5", "--name", "n", "--no-wait"
    )
    assert result.code == 0, result.err
    assert posted["/merge"] == {
        "adapters": [{"id": IDS[0], "weight": 1.0}, {"id": IDS[1], "weight": 0.5}],
        "method": "search",
        "parameters": {
            "trials": 30,
            "seed": 7,
            "methods": [
                {"method": "svd", "parameters": {}},
                {
                    "method": "core_space",
                    "parameters": {
                        "density": {"low": 0.1, "high": 0.9},
                        "rule": {"choices": ["ties", "tsv"]},
                        "seed": 3,
                    },
                },
            ],
            "weights": [{"low": 0.2, "high": 1.5}],
            "ranks": [8, "r"],
            "seconds": 600.0,
        },
        "evaluation": {"datasets": ["dat_1", "dat_2"], "metric": "exact_match", "max_rows": 50},
        "name": "n",
    }
    assert "jobs watch job_1" in result.err


def test_what_is_not_said_is_left_to_the_service(cli: Callable[..., Any], posted: dict[str, Any]) -> None:
    assert cli("merge-search", *IDS, "--dataset", "dat_1", "--no-wait").code == 0
    assert posted["/merge"]["parameters"] == {"trials": 20, "seed": 0}
    assert posted["/merge"]["evaluation"] == {"datasets": ["dat_1"], "metric": "loss"}


def test_files_and_bad_ranges_are_wrong_usage(cli: Callable[..., Any], posted: dict[str, Any], adapters: Any) -> None:
    files = cli("merge-search", *adapters, "--dataset", "dat_1")
    assert files.code == 2
    assert "datasets of the service" in files.err
    ranges = cli("merge-search", *IDS, "--dataset", "dat_1", "--weights", "low..1")
    assert ranges.code == 2
    assert "LOW..HIGH" in ranges.err
    assert posted == {}


def test_the_report_shows_the_trials_and_the_best_merge(capsys: pytest.CaptureFixture[str]) -> None:
    trial = {
        "label": "svd",
        "parameters": {"rank": 4},
        "weights": [0.5, 2.0],
        "rank": 4,
        "seconds": 1.5,
        "problem": None,
    }
    failed = {"state": "failed", "problem": "rank is too large", "rank": None}
    report = {
        "method": "search",
        "metric": "loss",
        "ended_by": "trials",
        "ranking": [2, 0],
        "trials": [
            {**trial, "number": 0, "state": "measured", "figures": {"loss": 0.75}},
            {**trial, "number": 1, **failed},
            {**trial, "number": 2, "state": "measured", "figures": {"loss": 0.25}},
        ],
        "evaluation": {"base": {"loss": 3.0}},
        "merge": {"method": "svd", "rank": 4, "adapters": [{"name": "dates"}, {"name": "orders"}], "modules": []},
    }
    reports.print_report(stdout(), report)
    shown = capsys.readouterr().out
    assert shown.index("0.25") < shown.index("0.75") < shown.index("rank is too")
    assert "3 trials, ended by trials" in shown
    assert "the base model alone: loss 3" in shown
    assert "merge report: svd" in shown
