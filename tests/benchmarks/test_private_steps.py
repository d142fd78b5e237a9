"""The benchmark of private steps runs, with sizes that say nothing of speed, and knows what is to be reached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import private_steps


def test_both_kinds_of_step_are_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "train")
    from tiny_base import write_tiny_base

    base = write_tiny_base(tmp_path / "base")
    sizes = "--layers 2 --rank 4 --rows 2 --length 16 --steps 1 --rounds 2 --threads 1"
    private_steps.main([*sizes.split(), "--base", str(base), "--results", str(tmp_path)])
    document = json.loads((tmp_path / "private_steps.json").read_text())
    assert document["goal"] == 2.5
    assert {name: len(seconds) for name, seconds in document["seconds"].items()} == {"plain": 2, "private": 2}
    assert f"takes {document['ratio']:.2f} times a plain one" in capsys.readouterr().out
