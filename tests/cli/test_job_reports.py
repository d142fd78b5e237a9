"""Every kind of job has a printer for its report, which prints what the job makes."""

from __future__ import annotations

from typing import Any

import pytest

from app.cli.job_reports import REPORTS
from app.cli.jobs import show
from merge.conversion import ConversionReport
from merge.nearest_lora import ConvertedModule
from workers.engines.loaded_numbers import Count
from workers.kinds import KINDS

CONVERTED = ConversionReport("loha", 4, False, 0.125, (ConvertedModule("q_proj", 4, None, 0.125),))
CHECKED = {
    "engine": "peft",
    "base_model": {"id": None, "name": None, "built_from": "skeleton", "class": "Skeleton"},
    "refusal": None,
    "warnings": ["a warning"],
}
REPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "convert": (CONVERTED.to_dict(), "0.125"),
    "import": (
        {
            "source": {"revision": "abc"}, "format": "peft", "method": "lora", "modules": 12, "used_keys": 24,
            "ignored_keys": 0, "ignored": [], "warnings": [],
        },
        "abc",
    ),
    "push": (
        {
            "adapter": "adp_1", "relative_error": None, "files": [{"path": "README.md"}], "hub": {"repo": "a/b"},
        },
        "README.md",
    ),
    "load_check": (
        CHECKED | {"verdict": "partly"} | Count({"a": True, "b": False}, ["b.lora_A"], tensors=4).report(),
        "1 of 2",
    ),
    "client_update": ({"rows": 3, "seconds": 1.5, "loss": 0.25, "bytes": 10}, "0.25"),
}  # fmt: skip


def test_every_kind_has_a_printer() -> None:
    assert set(REPORTS) == set(KINDS)


@pytest.mark.parametrize("kind", REPORTED)
def test_a_finished_job_is_shown_with_its_report(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    report, told = REPORTED[kind]
    show({"id": "job_1", "kind": kind, "state": "succeeded", "result": {"report": report}})
    assert told in capsys.readouterr().out


def test_a_refused_load_is_shown_with_what_the_library_raised(capsys: pytest.CaptureFixture[str]) -> None:
    refused = CHECKED | {"verdict": "refuses", "refusal": {"type": "ValueError", "message": "no such layer"}}
    show({"id": "job_1", "kind": "load_check", "state": "succeeded", "result": {"report": refused}})
    assert "ValueError: no such layer" in capsys.readouterr().out


def test_a_kind_of_a_newer_service_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    show({"id": "job_1", "kind": "dream", "state": "succeeded", "result": {"report": {"sheep": 7}}})
    assert '"sheep": 7' in capsys.readouterr().out
