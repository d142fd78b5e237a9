"""The benchmark of generation runs, with a model that says nothing of speed, and knows what is to be reached."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import transfer

sys.path.insert(0, str(Path(__file__).parents[1] / "transfer"))


def test_it_measures_both_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tiny_models import write_llama

    base = write_llama(tmp_path / "base", max_positions=2048)
    words = ["--base", str(base), "--batches", "1", "--singles", "1", "--batch-size", "4", "--max-new-tokens", "6"]
    code = transfer.main([*words, "--results", str(tmp_path)])
    figures = {item["name"]: item for item in json.loads((tmp_path / "transfer.json").read_text())["figures"]}
    assert code == int(not (figures["ratio"]["passed"] and figures["ratio of CPU time"]["passed"]))
    assert figures["ratio"]["goal"] == 3.0
    assert not figures["ratio"]["at_most"]
    assert 1 <= figures["naive loop"]["detail"]["tokens"] <= 6
    assert figures["transfer.generation"]["detail"]["tokens"] >= 4
    assert "ratio" in capsys.readouterr().out
