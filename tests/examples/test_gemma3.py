"""The second base model: a GGUF in pieces, each in a package of its own."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from examples.gemma3 import base_model
from examples.gemma3.base_model import find_parts
from examples.model_cache import CACHE_VARIABLE, BaseModelUnavailableError, converted_directory

ROOT = Path(__file__).resolve().parents[2]


def test_the_pieces_are_joined_in_order_and_the_whole_decides_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    pieces = [tmp_path / name for name in ("first", "second", "third")]
    for piece, text in zip(pieces, (b"GGUF and ", b"", b"so on"), strict=True):
        piece.write_bytes(text)

    def convert(source: Path, destination: Path) -> None:
        (destination / "copy").write_bytes(source.read_bytes())

    directory = converted_directory(pieces, convert)
    assert directory.name == hashlib.sha256(b"GGUF and so on").hexdigest()
    assert (directory / "copy").read_bytes() == b"GGUF and so on"
    assert sorted(path.name for path in directory.parent.iterdir()) == [directory.name, f"{directory.name}.lock"]


def test_a_missing_piece_is_named_with_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("gemma-hollow-part1", "gemma-hollow-part2")
    (tmp_path / "gemma_hollow_part1" / "data").mkdir(parents=True)
    (tmp_path / "gemma_hollow_part1" / "data" / "model.gguf.part00").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(base_model, "PARTS", names)
    with pytest.raises(BaseModelUnavailableError, match="gemma-hollow-part2 is not installed: run `make setup-slow`"):
        find_parts()
    (tmp_path / "gemma_hollow_part2").mkdir()
    with pytest.raises(BaseModelUnavailableError, match="gemma-hollow-part2 holds 0 pieces"):
        find_parts()


def test_make_installs_the_versions_that_the_message_names() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"{base_model.PACKAGE}%=={base_model.VERSION}" in makefile
    assert all(part.removeprefix(base_model.PACKAGE) in makefile for part in base_model.PARTS)
