"""`rankwise datasets` against a real service."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("remote")


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    path = tmp_path / "small-talk.jsonl"
    lines = [json.dumps({"prompt": f"question [{number}]", "completion": f"answer {number}"}) for number in range(30)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_add_get_rows_and_list(cli: Callable[..., Any], chat: Path) -> None:
    added = cli("datasets", "add", chat)
    assert added.code == 0, added.err
    for text in ("small-talk", "prompt-completion", "there is no column `messages`"):
        assert text in added.out
    again = cli("datasets", "add", chat, "--json")
    identifier = again.json["id"]
    assert "was there" in cli("datasets", "add", chat).out
    assert cli("datasets", "get", identifier, "--json").json == again.json
    assert "completion" in cli("datasets", "get", identifier).out
    rows = cli("datasets", "rows", identifier, "--offset", 3, "--limit", 2)
    assert "question [3]" in rows.out
    assert "30 rows" in rows.out
    assert "--offset 5" in rows.err
    assert cli("datasets", "rows", identifier, "--json").json["next"] == 20
    assert identifier in cli("datasets", "list", "--name", "SMALL", "--format", "jsonl").out
    assert cli("datasets", "list", "--format", "parquet", "--json").json["items"] == []


def test_download_and_delete(cli: Callable[..., Any], chat: Path, tmp_path: Path) -> None:
    chat.write_text(chat.read_text(encoding="utf-8") + "\n\n", encoding="utf-8")
    identifier = cli("datasets", "add", chat, "--name", "to go", "--json").json["id"]
    fetched = cli("datasets", "download", identifier, "-o", tmp_path / "out")
    assert fetched.code == 0, fetched.err
    assert (tmp_path / "out" / "to-go.jsonl").read_bytes() == chat.read_bytes()
    assert cli("datasets", "download", identifier, "-o", tmp_path / "out").code == 1
    assert cli("datasets", "delete", identifier, "--yes").out.startswith("deleted")
    assert cli("datasets", "get", identifier).code == 1


def test_bad_rows_are_shown(cli: Callable[..., Any], tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label\na,1\nb\n", encoding="utf-8")
    result = cli("datasets", "add", bad)
    assert result.code == 1
    assert "row 2: line 3: has 1 cells; the header has 2" in result.err
    assert cli("datasets", "add", tmp_path / "none.csv").code == 1
    assert cli("datasets", "add", bad, bad, "--name", "x").code == 2
