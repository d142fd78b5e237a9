"""`rankwise demo`: what it refuses, and the whole of it on a few items."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app import demo


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """The command changes what SIGTERM does; that must not outlive a test."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_folder_that_holds_something_else_is_not_emptied(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep me", encoding="utf-8")
    result = cli("demo", "--directory", tmp_path)
    assert result.code == 1
    assert "no demonstration made" in result.err
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "keep me"


def test_missing_adapters_are_named(cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "EXAMPLES", tmp_path / "nothing")
    result = cli("demo", "--directory", tmp_path / "demo")
    assert result.code == 1
    assert "dates" in result.err
    assert not (tmp_path / "demo").exists()


def test_a_failing_step_ends_it(cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base model can not be cached: exit code 1, with what the step itself said."""
    monkeypatch.setenv("RANKWISE_MODEL_CACHE", "/dev/null/nowhere")
    result = cli("demo", "--directory", tmp_path / "demo")
    assert result.code == 1
    assert "examples.smollm2.base_model" in result.err
    assert "/dev/null" in result.err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_demonstration(cli: Callable[..., Any], tmp_path: Path) -> None:
    result = cli("demo", "--directory", tmp_path / "demo", "--items", "16")
    assert result.code == 0, result.err
    for text in ("energy kept", "factor-wise average", "merged: lego", "What to try next", "curl "):
        assert text in result.out
    scores = json.loads((tmp_path / "demo" / "scores.json").read_text(encoding="utf-8"))
    for task in demo.MERGED:
        assert scores["base"]["tasks"][task]["exact_match"] < 0.15
        assert scores[task]["tasks"][task]["exact_match"] > 0.85
        assert scores["merged: lego"]["tasks"][task]["exact_match"] > 0.5
    again = cli("demo", "--directory", tmp_path / "demo", "--items", "0")
    assert again.code == 2
