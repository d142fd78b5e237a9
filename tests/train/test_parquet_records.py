"""Parquet: what is taken, what is refused by name, and in how much memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.errors import FileBroken
from train.rows import Limits, inspect, iter_rows, iter_stored

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(table: pa.Table | dict[str, Any], **options: Any) -> Path:
        path = tmp_path / "file.parquet"
        pq.write_table(pa.table(table) if isinstance(table, dict) else table, path, **options)
        return path

    return write


def test_every_type_that_training_reads(save: Save) -> None:
    table = pa.table(
        {
            "text": ["a", None, "é" * 3],
            "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
            "long": pa.array(["1", "2", "3"], pa.large_string()),
            "label": pa.array([1, 2, None], pa.int8()),
            "score": pa.array([0.5, None, 2.0], pa.float32()),
            "flag": [True, False, None],
            "nothing": pa.nulls(3),
            "messages": [CHAT, CHAT, None],
            "tokens": [["a", "b"], [], ["c"]],
            "tags": pa.array([[1, 2], [], [3]], pa.list_(pa.uint16())),
        }
    )
    path = save(table)
    info = inspect(path, "parquet")
    assert {column.name: column.type for column in info.columns} == {
        "text": "string",
        "kind": "string",
        "long": "string",
        "label": "integer",
        "score": "number",
        "flag": "boolean",
        "nothing": "null",
        "messages": "messages",
        "tokens": "list<string>",
        "tags": "list<integer>",
    }
    assert [column.nulls for column in info.columns] == [1, 0, 0, 1, 1, 1, 3, 1, 0, 0]
    assert list(iter_rows(path, "parquet")) == table.to_pylist()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array([b"a"]), "is binary"),
        (pa.array([b"a"], pa.binary(1)), "is binary"),
        (pa.array([{"a": 1}]), "is nested: struct<a: int64>"),
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), "is nested: map<string, int64"),
        (pa.array([[["a"]]]), "is a list of list<"),
        (pa.array([[0.5]]), "is a list of double"),
        (pa.array([[{"role": "user"}]]), "is a list of struct<role: string>"),
        (pa.array([0], pa.timestamp("us")), "is of type timestamp[us]"),
        (pa.array([0], pa.date32()), "is of type date32[day]"),
    ],
)
def test_other_types_are_refused_by_the_name_of_the_column(save: Save, values: pa.Array, message: str) -> None:
    with pytest.raises(FileBroken) as caught:
        inspect(save({"text": ["a"], "bad": values, "worse": pa.array([b"a"])}), "parquet")
    first, second = caught.value.errors
    assert (first.pointer, second.pointer) == ("bad", "worse")
    assert first.message.startswith(message)


def test_a_column_that_is_there_twice(save: Save) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["x", "x"])
    with pytest.raises(FileBroken, match="'x' is there twice"):
        inspect(save(table), "parquet")


def test_values_that_json_can_not_hold_are_named(save: Save) -> None:
    score = pa.array([0.0, float("nan"), 1.0, float("inf")])
    with pytest.raises(FileBroken) as caught:
        inspect(save({"score": score}, row_group_size=2), "parquet")
    assert [item.pointer for item in caught.value.errors] == ["row 2", "row 4"]
    assert "column 'score': NaN or infinity" in caught.value.errors[0].message
    with pytest.raises(FileBroken, match="does not fit in 64 bits"):
        inspect(save({"n": pa.array([2**64 - 1], pa.uint64())}), "parquet")


def test_no_rows_and_no_columns(save: Save) -> None:
    with pytest.raises(FileBroken, match="has no rows"):
        inspect(save({"text": pa.array([], pa.string())}), "parquet")
    with pytest.raises(FileBroken, match="has no columns"):
        inspect(save(pa.table({})), "parquet")


def test_damaged_files_are_refused(save: Save, tmp_path: Path) -> None:
    whole = save({"text": [f"row {number}" for number in range(1000)]}, compression="none").read_bytes()
    damaged = {
        "cut": whole[: len(whole) // 2],
        "no footer": whole[:4] + b"\0" * 100,
        "footer": whole[:-20] + b"\xff" * 12 + whole[-8:],
        "length": whole[:-8] + b"\xff\xff\xff\x7f" + whole[-4:],
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FileBroken, match="Parquet file can not be read"):
            inspect(tmp_path / name, "parquet")


def test_a_page_with_a_wrong_checksum_is_refused(save: Save) -> None:
    path = save({"n": list(range(1000))}, compression="none", write_page_checksum=True, use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileBroken, match="can not be read"):
        inspect(path, "parquet")


def test_text_that_is_not_utf8_is_named(save: Save) -> None:
    raw = pa.array([b"fine", b"caf\xe9"]).view(pa.string())
    with pytest.raises(FileBroken, match="rows 1 to 2 hold text that is not UTF-8"):
        inspect(save({"text": raw}), "parquet")


def test_a_row_that_is_too_long_is_named(save: Save) -> None:
    path = save({"text": ["a", "b" * 101, "c" * 60], "more": ["a", "b", "d" * 60], "n": [1, 2, 3]})
    with pytest.raises(FileBroken) as caught:
        inspect(path, "parquet", Limits(max_row_bytes=100))
    assert [(item.pointer, item.message) for item in caught.value.errors] == [
        ("row 2", "has 110 bytes; at most 100 are allowed"),
        ("row 3", "has 128 bytes; at most 100 are allowed"),
    ]


def test_a_row_group_that_takes_too_much_memory_is_refused(save: Save) -> None:
    path = save({"n": list(range(10_000))})
    limits = Limits(max_row_group_bytes=60_000)
    with pytest.raises(FileBroken, match=r"Row group 1 takes \d+ bytes in memory; at most 60000") as caught:
        inspect(path, "parquet", limits)
    assert "smaller row groups" in str(caught.value.hint)
    assert inspect(save({"n": list(range(10_000))}, row_group_size=5000), "parquet", limits).rows == 10_000


def test_rows_are_found_from_any_place(save: Save) -> None:
    path = save({"n": list(range(5000))}, row_group_size=1500)
    with path.open("rb") as file:
        for skip in (0, 1, 63, 64, 1499, 1500, 1501, 4999):
            number, row = next(iter_stored(file, "parquet", skip))
            assert (number, row) == (skip + 1, {"n": skip})
        assert next(iter_stored(file, "parquet", 5000), None) is None


PROGRAM = """
import resource, sys
from pathlib import Path
import pyarrow.parquet
from artifacts.errors import FileBroken
from train.rows import Limits, inspect
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(inspect(Path(sys.argv[1]), "parquet").rows)
except FileBroken as error:
    print(error.detail)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def _measured(path: Path) -> tuple[str, int]:
    """What inspecting the file says, and by how many MiB the process grows."""
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, check=True)
    said, grown = run.stdout.splitlines()
    return said, int(grown)


def test_text_that_is_repeated_is_not_multiplied_in_memory(save: Save) -> None:
    """A small file whose rows all refer to one text of 1 MB, and one whose lists do so a thousand times each."""
    long = pa.array(["x" * 1_000_000])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), long)
    path = save(pa.table({"text": column}))
    assert path.stat().st_size < 2_000_000
    said, grown = _measured(path)
    assert said == "2000"
    assert grown < 600  # MiB; the text of all rows is 2000
    offsets = pa.array(range(0, 64_001, 1000), pa.int32())
    inner = pa.DictionaryArray.from_arrays(pa.array([0] * 64_000, pa.int32()), long)
    said, grown = _measured(save(pa.table({"tokens": pa.ListArray.from_arrays(offsets, inner)})))
    assert said == "The rows 1 to 64 hold 64000000000 bytes of text; one row may have 1048576."
    assert grown < 300


text = st.none() | st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
row = st.fixed_dictionaries(
    {"text": text, "label": st.none() | st.integers(-100, 100), "tokens": st.none() | st.lists(text.filter(bool))}
)


@settings(max_examples=40, deadline=None)
@given(st.lists(row, min_size=1, max_size=40), st.integers(1, 7), st.booleans())
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, table: list[dict[str, Any]], group: int, dictionary: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.parquet"
    schema = pa.schema({"text": pa.string(), "label": pa.int32(), "tokens": pa.list_(pa.string())})
    pq.write_table(pa.Table.from_pylist(table, schema), path, row_group_size=group, use_dictionary=dictionary)
    assert inspect(path, "parquet").rows == len(table)
    assert list(iter_rows(path, "parquet")) == table
