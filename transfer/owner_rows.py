"""Rows that the owner of an adapter gives: inputs that were kept, and items to measure with. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from artifacts.errors import FieldError, RequestInvalid
from train.rows import Format, iter_rows

INPUT_COLUMNS = ("prompt",)
ITEM_COLUMNS = ("prompt", "completion")


def read_texts(path: Path, form: Format, columns: Sequence[str], pointer: str) -> list[tuple[str, ...]]:
    """These columns of every row.

    Args:
        pointer: where the request names the dataset.

    Raises:
        RequestInvalid: a row without text in one of them, by its number.
        FileBroken: it is no dataset of that format.
    """
    found = []
    for number, row in enumerate(iter_rows(path, form), 1):
        texts = [row.get(column) for column in columns]
        for column, text in zip(columns, texts, strict=True):
            if not isinstance(text, str):
                problem = f"row {number} has no text in the column {column!r}"
                raise RequestInvalid(f"{pointer}: {problem}.", errors=[FieldError(pointer, problem)])
        found.append(tuple(str(text) for text in texts))
    return found
