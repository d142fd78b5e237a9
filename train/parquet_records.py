"""Parquet, in bounded memory: one row group at a time, and of that a few rows at a time.

pyarrow is imported only when a Parquet file is read: the server starts without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from artifacts.errors import FieldError, FileBroken
from train.census import check_header
from train.records import Faults, Limits, Row
from train.values import MESSAGE_KEYS

_BATCH_ROWS = 1024
"""Rows that Arrow gives at once; their repeated text is there once."""

_PIECE_ROWS = 64
"""As many rows as become values of Python at once although their text may be as long as the limit."""

_READ_BYTES = 1024**2  # of a column, at once
_THRIFT_LIMIT = 16 * 1024**2  # bytes of text in the file's own description; its lists have at most 1/16 as many items


@contextmanager
def _as_broken() -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        text = " ".join(str(error).split())[:300]
        raise FileBroken(f"The Parquet file can not be read: {text}", hint="Write it again, unencrypted.") from error


def read_header(file: BinaryIO, limits: Limits) -> list[str]:
    """The names of the columns.

    Raises:
        FileBroken: not a Parquet file, or one with columns that training has no use for.
    """
    with _as_broken():
        return [str(name) for name in _open(file, limits).schema_arrow.names]


def read(file: BinaryIO, limits: Limits, faults: Faults, skip: int = 0) -> Iterator[tuple[int, Row]]:
    """The rows with their numbers; those that are not valid go to `faults`.

    Args:
        skip: so many rows at the start are not wanted. Row groups that hold no others are not read.

    Raises:
        FileBroken: see `read_header`; or the file is damaged, or a row group is too large.
    """
    with _as_broken():
        source = _open(file, limits)
    first = 1
    for group in range(source.metadata.num_row_groups):
        rows = source.metadata.row_group(group).num_rows
        if skip >= first - 1 + rows:
            first += rows
            continue
        number = first
        with _as_broken():
            batches = source.iter_batches(_BATCH_ROWS, row_groups=[group], use_threads=False)
        while (batch := _next(batches)) is not None:
            for piece in _pieces(batch, limits):
                yield from (row for row in _values(piece, number, limits, faults) if row[0] > skip)
                number += piece.num_rows
        first += rows


def _next(batches: Iterator[Any]) -> Any:
    with _as_broken():
        return next(batches, None)


def _open(file: BinaryIO, limits: Limits) -> Any:
    import pyarrow.parquet as pq

    options = {"thrift_string_size_limit": _THRIFT_LIMIT, "thrift_container_size_limit": _THRIFT_LIMIT // 16}
    file.seek(0)
    schema = pq.read_schema(file)
    check_header(list(schema.names), limits.max_columns)
    refused = [FieldError(field.name, fault) for field in schema if (fault := _type_fault(field.type)) is not None]
    if refused:
        raise FileBroken(
            f"The column {refused[0].pointer!r} {refused[0].message}.",
            hint="Drop these columns, or write them as text.",
            errors=refused,
        )
    # Repeated text stays one value with many references until its row is looked at.
    leaves = pq.read_metadata(file).schema
    texts = [leaf.path for leaf in map(leaves.column, range(len(leaves.names))) if leaf.physical_type == "BYTE_ARRAY"]
    source = pq.ParquetFile(
        file, read_dictionary=texts, page_checksum_verification=True, buffer_size=_READ_BYTES, **options
    )
    for group in range(source.metadata.num_row_groups):
        _check_row_group(source.metadata.row_group(group), group + 1, limits)
    return source


def _check_row_group(group: Any, number: int, limits: Limits) -> None:
    values = sum(group.column(position).num_values for position in range(group.num_columns))
    size = max(group.total_byte_size, 8 * values)
    if size > limits.max_row_group_bytes:
        raise FileBroken(
            f"Row group {number} takes {size} bytes in memory; at most {limits.max_row_group_bytes} are allowed.",
            hint="Write the file with smaller row groups, for instance row_group_size=50000.",
        )


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind))


def _type_fault(kind: Any) -> str | None:
    """Why values of this Arrow type are refused; None if they are not."""
    from pyarrow import types

    kind = _undictionaried(kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _undictionaried(kind.value_type)
        if _is_text(inner) or types.is_integer(inner) or _is_messages(inner):
            return None
        return f"is a list of {inner}; lists hold text, whole numbers, or messages of a role and a content"
    if _is_text(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
        return None
    if types.is_null(kind):
        return None
    if types.is_nested(kind):
        return f"is nested: {kind}"
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return "is binary"
    return f"is of type {kind}"


def _undictionaried(kind: Any) -> Any:
    """The type of the values, whether each is written out or looked up."""
    from pyarrow import types

    return kind.value_type if types.is_dictionary(kind) else kind


def _is_messages(kind: Any) -> bool:
    from pyarrow import types

    if not types.is_struct(kind):
        return False
    fields = [kind.field(position) for position in range(kind.num_fields)]
    return {field.name for field in fields} == MESSAGE_KEYS and all(
        _is_text(_undictionaried(field.type)) for field in fields
    )


def _pieces(batch: Any, limits: Limits) -> list[Any]:
    """The batch in pieces that may become values of Python at once: itself, unless its text is long."""
    with _as_broken():
        if sum(map(_text_bytes, batch.columns)) <= _PIECE_ROWS * limits.max_row_bytes:
            return [batch]
        return [batch.slice(start, _PIECE_ROWS) for start in range(0, batch.num_rows, _PIECE_ROWS)]


def _values(piece: Any, first: int, limits: Limits, faults: Faults) -> list[tuple[int, Row]]:
    """The valid rows of a piece, of which the first has the number `first`."""
    names = piece.schema.names
    with _as_broken():
        text = sum(map(_text_bytes, piece.columns))
        # Some row is too long: finding out which would take the memory that the limit is there to save.
        if text > _PIECE_ROWS * limits.max_row_bytes:
            raise _broken(piece, first, f"hold {text} bytes of text; one row may have {limits.max_row_bytes}")
        try:
            columns = [column.to_pylist() for column in piece.columns]
        except UnicodeDecodeError as error:
            raise _broken(piece, first, "hold text that is not UTF-8") from error
    valid = []
    for number, values in enumerate(zip(*columns, strict=True), first):
        size = sum(map(_size, values))
        if size > limits.max_row_bytes:
            faults.add(number, f"has {size} bytes; at most {limits.max_row_bytes} are allowed")
        else:
            valid.append((number, dict(zip(names, values, strict=True))))
    return valid


def _broken(piece: Any, first: int, message: str) -> FileBroken:
    rows = f"rows {first} to {first + piece.num_rows - 1}"
    return FileBroken(f"The {rows} {message}.", errors=[FieldError(rows, message)])


def _text_bytes(array: Any) -> int:
    """Bytes of the text that the values of an Arrow array have, each counted as often as it is repeated."""
    import pyarrow.compute as pc
    from pyarrow import types

    if types.is_dictionary(array.type):
        if not _is_text(array.type.value_type):
            return 0
        return pc.sum(pc.take(pc.binary_length(array.dictionary), array.indices)).as_py() or 0
    if types.is_struct(array.type):
        return sum(map(_text_bytes, array.flatten()))
    if types.is_nested(array.type):
        return _text_bytes(array.flatten())
    return (pc.sum(pc.binary_length(array)).as_py() or 0) if _is_text(array.type) else 0


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, list):
        return sum(map(_size, value))
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return 8
