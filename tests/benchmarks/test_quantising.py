"""The benchmark of quantising runs, on a model that says nothing of speed, and counts what the packed weights take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import quantising


def test_every_matrix_is_timed_and_the_packed_weights_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "train")
    from tiny_base import write_tiny_base

    base = write_tiny_base(tmp_path / "base")
    sizes = "--layers 1 --targets q_proj up_proj --rank 4 --budget 2.9 --threads 1"
    quantising.main([*sizes.split(), "--base", str(base), "--results", str(tmp_path)])
    document = json.loads((tmp_path / "quantising.json").read_text())
    figures = {figure["name"]: figure for figure in document["figures"]}
    assert figures["matrices"]["value"] == 2
    seconds = figures["the whole"]["detail"]["seconds"]
    assert sum(message.startswith("trying") for message in seconds) == 2
    assert sum(message.startswith("quantising") for message in seconds) == 2
    held = figures["packed weights in memory"]["detail"]
    # the two offsets are all that the formula leaves out, for no matrix ends within a byte
    assert held["bytes"] == held["bytes_by_the_formula"] + 8
    assert "packed weights in memory" in capsys.readouterr().out
