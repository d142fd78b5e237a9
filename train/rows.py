"""Datasets as files: which format one has, whether every row is valid, and its rows one after another."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import dropwhile
from pathlib import Path
from typing import BinaryIO, Literal

from artifacts.errors import FieldError, FileBroken, RequestInvalid
from train import csv_records, fasta_records, image_archive, json_lines, parquet_records
from train.census import Census, problems_of
from train.records import Column, DatasetInfo, Faults, FirstFault, Limits, Row, Suitability
from train.splits import Split, canonical, split_of
from train.suitability import Candidates
from train.text_lines import unpacked

__all__ = [
    "FORMATS",
    "Column",
    "DatasetInfo",
    "Format",
    "Limits",
    "Row",
    "Split",
    "Suitability",
    "canonical",
    "find_format",
    "inspect",
    "iter_rows",
    "iter_stored",
    "read_rows",
    "split_of",
]

Format = Literal["jsonl", "csv", "parquet", "images", "fasta"]
FORMATS: tuple[Format, ...] = ("jsonl", "csv", "parquet", "images", "fasta")
NAMES = {"jsonl": "JSON Lines", "csv": "CSV", "parquet": "Parquet", "images": "a zip of images", "fasta": "FASTA"}

_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".fa": "fasta",
    ".fasta": "fasta",
    ".fna": "fasta",
}
_TEXT = {"jsonl": json_lines.read, "csv": csv_records.read, "fasta": fasta_records.read}
_STORED = Limits(max_bytes=2**62)  # what was let in under a higher limit can still be read
_PARQUET_MAGIC = b"PAR1"
_SPACE = b" \t\r\n"


def find_format(path: Path, file_name: str, given: str | None = None) -> Format:
    """The format of a file: the one that is given, else the one of its name or, failing that, of its content.

    Raises:
        RequestInvalid: it can not be told, or is given and certainly wrong.
        FileBroken: nothing in it.
    """
    with path.open("rb") as file:
        magic = file.read(4)
        head = b"" if magic == _PARQUET_MAGIC else _head(file)
    if not magic:
        raise FileBroken("The file is empty.")
    if magic == _PARQUET_MAGIC:
        return _checked("parquet", given)
    if magic.startswith(image_archive.ZIP_MAGIC):
        return _checked("images", given)
    if given is not None:
        return _checked(next(name for name in FORMATS if name == given), given)
    suffixes = Path(file_name.lower().removesuffix(".gz")).suffix
    if suffixes in _SUFFIXES:
        return _SUFFIXES[suffixes]
    if head.lstrip(_SPACE).startswith(b"{"):
        return "jsonl"
    if head.lstrip(_SPACE).startswith(b">"):
        return "fasta"
    raise RequestInvalid(
        f"The format of {file_name[:80]!r} can not be told from its name, nor from its content.",
        hint=f"Say it: format={' or '.join(FORMATS)}.",
        errors=[FieldError("/format", "is needed for this file")],
    )


def _head(file: BinaryIO) -> bytes:
    try:
        return unpacked(file).read(4096)
    except (EOFError, OSError) as error:
        raise FileBroken(f"The gzip file is cut off or damaged: {error}.") from error


def _checked(found: Format, given: str | None) -> Format:
    if given is not None and given != found:
        message = f"the file is {NAMES[found]}, not {NAMES[given]}"
        raise RequestInvalid(f"{message[0].upper()}{message[1:]}.", errors=[FieldError("/format", message)])
    return found


def inspect(path: Path, format: Format, limits: Limits = Limits()) -> DatasetInfo:  # noqa: A002 (the field's own name)
    """Read the whole file, row by row, and tell what it holds.

    Raises:
        FileBroken: some rows are not valid (the first 20 are named, all are counted), or there are none, or the file as
            a whole is not what its format promises.
        ArchiveRefused: a zip that is damaged, or not harmless.
        TooLarge: more bytes, unpacked, than allowed.
    """
    faults, candidates = Faults(), Candidates()
    rows = 0
    with path.open("rb") as file:
        census = Census(limits.max_columns, _declared(file, format, limits))
        found = read_rows(file, format, limits, faults)
        if format == "images":
            found = image_archive.decoded(file, found, limits, faults)
        for number, row in found:
            if number > limits.max_rows:
                raise FileBroken(f"The file has more than {limits.max_rows} rows.", hint="Split it.")
            fault = census.add(number, row)
            if fault is not None:
                faults.add(number, fault)
                continue
            candidates.add(number, row)
            rows += 1
    faults.check(rows)
    if rows == 0:
        raise FileBroken("The file has no rows.", hint="A dataset has at least one row of data.")
    columns = census.columns()
    if format == "images":
        return DatasetInfo(rows, columns, (), (image_archive.SUITABLE,))
    return DatasetInfo(rows, columns, problems_of(columns), candidates.verdicts())


def iter_rows(path: Path, format: Format) -> Iterator[Row]:  # noqa: A002
    """The rows of a file that `inspect` found valid, in order.

    Raises:
        FileBroken: a row is not valid after all.
    """
    with path.open("rb") as file:
        for _, row in iter_stored(file, format):
            yield row


def iter_stored(file: BinaryIO, format: Format, skip: int = 0) -> Iterator[tuple[int, Row]]:  # noqa: A002
    """(row number from 1, row) of a valid file, behind the first `skip` rows; see `read_rows` and `iter_rows`."""
    return read_rows(file, format, _STORED, FirstFault(), skip)


def read_rows(
    file: BinaryIO,
    format: Format,  # noqa: A002
    limits: Limits,
    faults: Faults,
    skip: int = 0,
) -> Iterator[tuple[int, Row]]:
    """(row number from 1, row) of each valid row behind the first `skip`; the others go to `faults`.

    Args:
        file: can seek; read from its start.

    Raises:
        FileBroken, TooLarge: as for `inspect`, about the file as a whole.
    """
    if format == "parquet":
        return parquet_records.read(file, limits, faults, skip)
    if format == "images":
        return image_archive.read(file, limits, faults, skip)
    rows = _TEXT[format](file, limits, faults)
    return dropwhile(lambda row: row[0] <= skip, rows) if skip else rows


def _declared(file: BinaryIO, format: Format, limits: Limits) -> tuple[str, ...]:  # noqa: A002
    """The columns that the file names before its rows."""
    if format == "parquet":
        return tuple(parquet_records.read_header(file, limits))
    if format == "images":
        return image_archive.COLUMNS
    if format == "fasta":
        return fasta_records.COLUMNS
    return tuple(csv_records.read_header(file, limits)) if format == "csv" else ()
