"""Files of rows: what is taken, and how what is not is named."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.errors import ArchiveRefused, FileBroken, RequestInvalid, TooLarge
from train import rows
from train.rows import Column, Limits, find_format, inspect, iter_rows

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(content: bytes | str, name: str = "file") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return to_file


def findings(path: Path, kind: Any, limits: Limits = Limits()) -> list[tuple[str, str]]:
    with pytest.raises(FileBroken) as caught:
        inspect(path, kind, limits)
    return [(item.pointer, item.message) for item in caught.value.errors]


def test_json_lines_with_blank_lines_and_a_mark(write: Write) -> None:
    path = write(codecs.BOM_UTF8 + b'{"text": "a"}\r\n\n  \n{"text": "\xc3\xa9", "label": null}\n{"label": 2}')
    info = inspect(path, "jsonl")
    assert info.rows == 3
    assert [(column.name, column.type, column.nulls) for column in info.columns] == [
        ("text", "string", 1),
        ("label", "integer", 2),
    ]
    assert list(iter_rows(path, "jsonl")) == [{"text": "a"}, {"text": "é", "label": None}, {"label": 2}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a",}', "line 2: is not JSON: "),
        (b"hello", "line 2: is not JSON: Expecting value at place 1"),
        (b'{"text": "a"} {"text": "b"}', "line 2: is not JSON: Extra data at place 15"),
        (b'["a"]', "line 2: is a JSON array, not an object"),
        (b'"a"', "line 2: is a JSON string, not an object"),
        (b"null", "line 2: is a JSON null, not an object"),
        (b"true", "line 2: is a JSON truth value, not an object"),
        (b'{"text": "a", "text": "b"}', "line 2: has the key 'text' twice"),
        (b'{"text": NaN}', "line 2: has NaN, which is no JSON number"),
        (b'{"text": 1e999}', "column 'text': NaN or infinity, which is no JSON number"),
        (b'{"text": 9223372036854775808}', "column 'text': an integer that does not fit in 64 bits"),
        (b'{"text": "\xe9"}', "line 2: byte 0xe9 at place 11 is not UTF-8"),
        (rb'{"text": "\ud800"}', "line 2: has an unpaired surrogate, which is not valid text"),
        (rb'{"a\u0000b": 1}', "the column name 'a\\x00b' has a control character"),
        (b'{"": 1}', "a column has no name"),
        (b'{"text": ' + b"[" * 40 + b"]" * 40 + b"}", "column 'text': nested deeper than 32 levels"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 2: is nested too deeply"),
        (b'{"text": "' + b"x" * 2**20 + b'"}', "line 2: is over the limit of 1048576 bytes"),
    ],
)
def test_a_bad_line_is_named(write: Write, line: bytes, message: str) -> None:
    (found,) = findings(write(b'{"text": "a"}\n' + line + b'\n{"text": "c"}\n'), "jsonl")
    assert found[0] == "row 2"
    assert found[1].startswith(message)


def test_integers_of_endless_digits_are_named(write: Write) -> None:
    (found,) = findings(write(b'{"n": ' + b"9" * 5000 + b"}\n"), "jsonl")
    assert found[0] == "row 1"
    assert "4300 digits" in found[1]


def test_the_first_twenty_bad_rows_are_listed_and_all_are_counted(write: Write) -> None:
    lines = [b'{"n": %d}' % number if number % 2 else b"{" for number in range(100)]
    with pytest.raises(FileBroken) as caught:
        inspect(write(b"\n".join(lines)), "jsonl")
    assert caught.value.detail.startswith("50 of 100 rows are not valid; row 1: line 1: is not JSON")
    assert [item.pointer for item in caught.value.errors] == [f"row {number}" for number in range(1, 41, 2)]


def test_columns_of_several_types_are_reported(write: Write) -> None:
    info = inspect(write('{"label": 1, "score": 1}\n{"label": "x", "score": 0.5}\n{"label": 2}\n'), "jsonl")
    assert [(column.name, column.type) for column in info.columns] == [("label", "mixed"), ("score", "number")]
    assert info.problems == (
        (
            "column 'label' has values of several types: integer (rows: 2, the first is row 1), "
            "string (rows: 1, the first is row 2)"
        ),
    )


@pytest.mark.parametrize("content", [b"", b"\n\n", gzip.compress(b"", mtime=0), b" \n"])
def test_a_file_without_rows_is_refused(write: Write, content: bytes) -> None:
    with pytest.raises(FileBroken, match="has no rows"):
        inspect(write(content), "jsonl")


def test_a_json_array_is_told_what_json_lines_are(write: Write) -> None:
    with pytest.raises(FileBroken, match="begins with a JSON array"):
        inspect(write('[{"a": 1}]'), "jsonl")


def test_packed_files_are_read_and_damaged_ones_refused(write: Write) -> None:
    text = b"".join(b'{"text": "row %d"}\n' % number for number in range(1000))
    packed = gzip.compress(text, mtime=0)
    assert inspect(write(packed, "a"), "jsonl") == inspect(write(text, "b"), "jsonl")
    for damaged in (packed[:-9], packed[:100], packed[:20] + b"\xff\xff" + packed[22:], packed[:-8] + b"\0" * 8):
        with pytest.raises(FileBroken, match="gzip file is cut off or damaged"):
            inspect(write(damaged, "c"), "jsonl")


def test_a_gzip_bomb_stops_at_the_limit(write: Write) -> None:
    path = write(gzip.compress(b'{"text": "a"}\n' * 100_000, mtime=0))
    with pytest.raises(TooLarge, match="over the limit of 100000 bytes"):
        inspect(path, "jsonl", Limits(max_bytes=100_000))
    endless = write(gzip.compress(b"a" * 10**7, mtime=0))  # one line, of which only the start is kept
    with pytest.raises(TooLarge):
        inspect(endless, "jsonl", Limits(max_bytes=100_000, max_row_bytes=1000))


def test_too_many_rows_and_columns(write: Write) -> None:
    path = write('{"a": 1}\n{"b": 1}\n{"c": 1}\n')
    with pytest.raises(FileBroken, match="more than 2 rows"):
        inspect(path, "jsonl", Limits(max_rows=2))
    with pytest.raises(FileBroken, match="more than 2 columns"):
        inspect(path, "jsonl", Limits(max_columns=2))
    assert inspect(path, "jsonl", Limits(max_rows=3, max_columns=3)).rows == 3


def test_csv_with_quotes_and_lines_in_cells(write: Write) -> None:
    path = write(codecs.BOM_UTF8 + b'text,label\r\n"a, ""b""\r\nc",1\r\n\r\n,x\r\n')
    info = inspect(path, "csv")
    assert info.columns[0] == Column("text", "string", 0, info.columns[0].kinds)
    assert list(iter_rows(path, "csv")) == [{"text": 'a, "b"\r\nc', "label": "1"}, {"text": "", "label": "x"}]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"1,2\n3\n", [("row 2", "line 3: has 1 cells; the header has 2")]),
        (b"1,2\n3,4,5\n", [("row 2", "line 3: has 3 cells; the header has 2")]),
        (b'"a\nb",2\n3\n', [("row 2", "line 4: has 1 cells; the header has 2")]),
        (b"1,2\n\xe9t\xe9,4\n5,6\n", [("row 2", "line 3: byte 0xe9 at place 1 is not UTF-8")]),
        (b'1,2\n"a"b,4\n5,6\n', [("row 2", "line 3: ',' expected after '\"'")]),
        (b'1,2\n"open,4\n5,6\n', [("row 2", "line 3: unexpected end of data")]),
    ],
)
def test_a_bad_csv_row_is_named(write: Write, body: bytes, expected: list[tuple[str, str]]) -> None:
    assert findings(write(b"a,b\n" + body), "csv") == expected


def test_an_open_quote_does_not_swallow_the_file(write: Write) -> None:
    path = write(b'a,b\n1,2\n"open,4\n' + b"5,6\n" * 1000)
    (found,) = findings(path, "csv", Limits(max_row_bytes=1000))
    assert found == ("row 2", "line 3: is over the limit of 1000 bytes; is a quote left open? What follows is not read")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"a,b,a\n1,2,3\n", "the column 'a' is there twice: columns 1 and 3"),
        (b"a,,c\n1,2,3\n", "a column has no name"),
        (b"a;b\n1;2\n", "seems to be separated by semicolons or tabs"),
        (b"caf\xe9,b\n1,2\n", "line 1: byte 0xe9 at place 4 is not UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), "is UTF-16"),
        (b"x" * 300 + b",b\n1,2\n", "the column name 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'… has 300 characters"),
        (",".join(map(str, range(300))).encode(), "there are more than 256 columns"),
    ],
)
def test_a_bad_header_is_named(write: Write, header: bytes, message: str) -> None:
    (found,) = findings(write(header), "csv")
    assert message in found[1]


def test_csv_without_anything(write: Write) -> None:
    with pytest.raises(FileBroken, match="not even a header"):
        inspect(write(b"\n\n"), "csv")
    with pytest.raises(FileBroken, match="has no rows"):
        inspect(write(b"a,b\n"), "csv")


@pytest.mark.parametrize(
    ("content", "name", "given", "expected"),
    [
        (b'{"a": 1}', "data.JSONL", None, "jsonl"),
        (gzip.compress(b'{"a": 1}', mtime=0), "data.jsonl.gz", None, "jsonl"),
        (gzip.compress(b'\n {"a": 1}', mtime=0), "data", None, "jsonl"),
        (b"a,b\n", "data.csv", None, "csv"),
        (b"a,b\n", "data", "csv", "csv"),
        (b'{"a": 1}', "data.csv", "jsonl", "jsonl"),
        (b"PAR1....", "data.csv", None, "parquet"),
    ],
)
def test_the_format_is_found(write: Write, content: bytes, name: str, given: str | None, expected: str) -> None:
    assert find_format(write(content), name, given) == expected


def test_a_format_that_can_not_be_told_or_is_wrong(write: Write) -> None:
    for path, name, kind in ((write(b"a,b\n"), "data.txt", None), (write(b"PAR1", "p"), "data.csv", "csv")):
        with pytest.raises(RequestInvalid) as caught:
            find_format(path, name, kind)
        assert caught.value.errors[0].pointer == "/format"
    with pytest.raises(FileBroken, match="empty"):
        find_format(write(b"", "e"), "data.csv")
    with pytest.raises(FileBroken, match="cut off"):
        find_format(write(b"\x1f\x8b\x08", "g"), "data")


def test_a_file_that_has_changed_is_not_read_as_valid(write: Write) -> None:
    with pytest.raises(FileBroken, match="row 2: line 2: is not JSON"):
        list(iter_rows(write('{"a": 1}\n{"a": '), "jsonl"))


text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
names = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FFF, exclude_categories=("Cs", "Cc")), min_size=1)
leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | text
values = leaves.filter(lambda value: value not in (float("inf"), float("-inf"))) | st.lists(text, max_size=4)
tables = st.lists(st.dictionaries(names.filter(str.strip), values, max_size=4), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(tables, st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_what_was_written_as_json_lines_is_read(
    tmp_path_factory: pytest.TempPathFactory, table: list[dict[str, Any]], ascii_only: bool, end: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_bytes("".join(json.dumps(row, ensure_ascii=ascii_only) + end for row in table).encode())
    assert inspect(path, "jsonl").rows == len(table)
    assert list(iter_rows(path, "jsonl")) == table


cells = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(cells, min_size=n, max_size=n), min_size=1, max_size=6)))
def test_what_was_written_as_csv_is_read(tmp_path_factory: pytest.TempPathFactory, table: list[list[str]]) -> None:
    header = [f"c{position}" for position in range(len(table[0]))]
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL)
    writer.writerows([header, *table])
    path = tmp_path_factory.getbasetemp() / "rows.csv"
    path.write_bytes(buffer.getvalue().encode())
    assert inspect(path, "csv").rows == len(table)
    assert list(iter_rows(path, "csv")) == [dict(zip(header, row, strict=True)) for row in table]


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=200),
    st.sampled_from(rows.FORMATS),
    st.sampled_from([b"", b'{"a": 1}\n', b"a,b\n", b"PAR1", b"PK"]),
)
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, kind: Any, start: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(start + content)
    try:
        info = inspect(path, kind)
    except (ArchiveRefused, FileBroken, TooLarge):
        return
    assert len(list(iter_rows(path, kind))) == info.rows
