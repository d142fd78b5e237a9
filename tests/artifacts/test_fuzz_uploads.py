"""A short run of the fuzz of uploads: `python -m scripts.fuzz_uploads --minutes 20` is the long one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from scripts import fuzz_uploads


def test_damaged_uploads_are_understood_or_refused() -> None:
    counts, found = fuzz_uploads.fuzz(0, 250, 0, None)
    assert found == []
    for target in ("header", "directory", "archive", "gguf", "keys"):
        assert counts[f"{target} accepted"] > 0
        assert counts[f"{target} refused"] > 0


def test_what_brings_the_reader_down_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(files: Mapping[str, bytes]) -> str:
        raise ZeroDivisionError(str(len(files)))

    monkeypatch.setattr(fuzz_uploads, "check_files", broken)
    _, found = fuzz_uploads.fuzz(0, 1, 0, tmp_path)
    (name,) = [path.name for path in tmp_path.iterdir()]
    assert name == "header-0"
    assert found[0].startswith("header 0: ")
    assert "ZeroDivisionError" in found[0]
    again: Any = fuzz_uploads.header_input(fuzz_uploads.Random(0))
    assert (tmp_path / name / "x.safetensors").read_bytes() == again["x.safetensors"]
