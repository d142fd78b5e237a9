"""What the columns of a dataset turn out to be, row by row."""

from __future__ import annotations

from artifacts.errors import FieldError, FileBroken
from train.records import Column, Kind, Row
from train.values import common_type, fault_of, type_of

MAX_NAME = 200  # characters


def name_fault(name: str) -> str | None:
    """What is wrong with the name of a column, if anything."""
    if not name.strip():
        return "a column has no name"
    if len(name) > MAX_NAME:
        return f"the column name {name[:40]!r}… has {len(name)} characters; at most {MAX_NAME} are allowed"
    if any(character < " " or character == "\x7f" or "\ud800" <= character <= "\udfff" for character in name):
        return f"the column name {name!r} has a control character"
    return None


def check_header(names: list[str], max_columns: int) -> None:
    """The names that a file declares for all of its rows.

    Raises:
        FileBroken: none, too many, one without a name, one twice.
    """
    if not names:
        raise FileBroken("The file has no columns.", errors=[FieldError("header", "is empty")])
    if len(names) > max_columns:
        raise too_many_columns(max_columns)
    for position, name in enumerate(names):
        fault = name_fault(name)
        if fault is None and name in names[:position]:
            fault = f"the column {name!r} is there twice: columns {names.index(name) + 1} and {position + 1}"
        if fault is not None:
            raise FileBroken(f"The header is not valid: {fault}.", errors=[FieldError("header", fault)])


def too_many_columns(limit: int) -> FileBroken:
    message = f"there are more than {limit} columns"
    return FileBroken(
        f"The file is refused: {message}.",
        hint="Drop those that training does not need.",
        errors=[FieldError("header", message)],
    )


class Census:
    """Counts, for each column, the rows that have each type of value.

    Args:
        names: columns that the file declares; others are found in the rows.
    """

    def __init__(self, max_columns: int, names: tuple[str, ...] = ()) -> None:
        self._max_columns = max_columns
        self._found: dict[str, dict[str, tuple[int, int]]] = {name: {} for name in names}  # type → (rows, first row)
        self._rows = 0

    def add(self, number: int, row: Row) -> str | None:
        """Count a row, or say what is wrong with it.

        Raises:
            FileBroken: too many columns.
        """
        for name, value in row.items():
            fault = name_fault(name) if name not in self._found else None
            if fault is not None:
                return fault
            fault = fault_of(value)
            if fault is not None:
                return f"column {name!r}: {fault}"
        self._rows += 1
        for name, value in row.items():
            types = self._found.setdefault(name, {})
            kind = type_of(value)
            rows, first = types.get(kind, (0, number))
            types[kind] = (rows + 1, first)
        if len(self._found) > self._max_columns:
            raise too_many_columns(self._max_columns)
        return None

    def columns(self) -> tuple[Column, ...]:
        """The columns, in the order in which they came."""
        return tuple(self._column(name, types) for name, types in self._found.items())

    def _column(self, name: str, types: dict[str, tuple[int, int]]) -> Column:
        kinds = [Kind(kind, rows, first) for kind, (rows, first) in types.items() if kind != "null"]
        kinds.sort(key=lambda kind: kind.first_row)
        nulls = self._rows - sum(kind.rows for kind in kinds)
        return Column(name, common_type(set(types)), nulls, tuple(kinds))


def problems_of(columns: tuple[Column, ...]) -> tuple[str, ...]:
    """What is odd about the columns."""
    return tuple(
        f"column {column.name!r} has values of several types: "
        + ", ".join(f"{kind.type} (rows: {kind.rows}, the first is row {kind.first_row})" for kind in column.kinds)
        for column in columns
        if column.type == "mixed"
    )
