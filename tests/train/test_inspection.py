"""Validation in a process of its own gives what it gives in this one, and survives what kills its reader."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from artifacts.errors import FileBroken, TooLarge
from train import inspection
from train.inspection import inspect_apart
from train.rows import Limits, inspect


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.parquet"
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    pq.write_table(pa.table({"messages": [chat] * 50, "label": [*range(49), None]}), path, compression="none")
    return path


def test_the_same_as_in_this_process(table: Path, tmp_path: Path) -> None:
    assert inspect_apart(table, "parquet") == inspect(table, "parquet")
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"a": 1}\n{"a": "é"}\n', encoding="utf-8")
    assert inspect_apart(mixed, "jsonl") == inspect(mixed, "jsonl")


def test_refusals_come_through(tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("a,b\n1\n2,3\n", encoding="utf-8")
    with pytest.raises(FileBroken) as here:
        inspect(bad, "csv")
    with pytest.raises(FileBroken) as there:
        inspect_apart(bad, "csv")
    assert (there.value.detail, there.value.hint, there.value.errors) == (
        here.value.detail,
        here.value.hint,
        here.value.errors,
    )
    with pytest.raises(TooLarge):
        inspect_apart(bad, "csv", Limits(max_bytes=3))


def test_a_file_that_kills_its_reader_is_refused(table: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a package of the same name in front, whose reader does what a damaged file can make native code do."""
    stand_in = tmp_path / "in-front" / "train"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").write_text("", encoding="utf-8")
    monkeypatch.setattr(inspection, "_ROOT", stand_in.parent)
    (stand_in / "inspection.py").write_text("import os\nos.abort()\n", encoding="utf-8")
    with pytest.raises(FileBroken, match="Reading the file ended with SIGABRT"):
        inspect_apart(table, "parquet")
    (stand_in / "inspection.py").write_text("raise ValueError('a bug')\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="a bug"):
        inspect_apart(table, "parquet")


def test_damaged_footers_never_end_this_process(table: Path) -> None:
    """Some of these make the reader throw where its own code does not expect it."""
    content = table.read_bytes()
    for place in range(0, 600, 60):
        damaged = bytearray(content)
        damaged[-20 - place] ^= 0x5A
        table.write_bytes(damaged)
        try:
            assert inspect_apart(table, "parquet").rows > 0
        except FileBroken as error:
            assert error.detail


PARENT = """
import sys
from pathlib import Path
from train.inspection import inspect_apart
inspect_apart(Path(sys.argv[1]), "jsonl")
"""


def test_the_reader_ends_with_its_parent(tmp_path: Path) -> None:
    fifo = tmp_path / "endless"
    os.mkfifo(fifo)
    with subprocess.Popen([sys.executable, "-c", PARENT, str(fifo)]) as parent:
        try:
            with fifo.open("wb"):  # opened when the reader has opened it, which then waits for what nobody writes
                (reader,) = psutil.Process(parent.pid).children()
                parent.send_signal(signal.SIGKILL)
                parent.wait(30)
                assert psutil.wait_procs([reader], timeout=30)[1] == []
        finally:
            parent.kill()
