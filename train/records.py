"""What validation of a dataset goes by and comes to: limits, rows that are not valid, what the file holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from artifacts.errors import FieldError, FileBroken

Row = dict[str, Any]
"""Column name → value: text, number, truth value, None, list, or (JSON Lines only) object."""

LISTED_FAULTS = 20
MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Limits:
    """What a dataset may be at most.

    Attributes:
        max_bytes: of its text, unpacked.
        max_row_bytes: of one row; in Parquet, of one value.
        max_row_group_bytes: of one row group of a Parquet file, unpacked: about what reading it takes in memory.
        max_images, max_image_bytes, max_pixels: of a zip of images, the last two of one image.
    """

    max_bytes: int = 8 * 1024 * MIB
    max_rows: int = 10_000_000
    max_row_bytes: int = MIB
    max_columns: int = 256
    max_row_group_bytes: int = 512 * MIB
    max_images: int = 100_000
    max_image_bytes: int = 64 * MIB
    max_pixels: int = 64_000_000


@dataclass(frozen=True, slots=True)
class Kind:
    """One of the types that a column's values have: in how many rows, and the first of them (1 is the first row)."""

    type: str
    rows: int
    first_row: int


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its type, "mixed" if its values have several, and in how many rows it has none or null."""

    name: str
    type: str
    nulls: int = 0
    kinds: tuple[Kind, ...] = ()


@dataclass(frozen=True, slots=True)
class Suitability:
    """Whether a dataset can serve a task, from which columns, and why it can not."""

    task: str
    form: str
    columns: tuple[str, ...]
    usable: bool
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """What a valid file holds. `problems` are worth a look and no reason to refuse it."""

    rows: int
    columns: tuple[Column, ...]
    problems: tuple[str, ...] = ()
    tasks: tuple[Suitability, ...] = ()


@dataclass(slots=True)
class Faults:
    """Rows that are not valid: all are counted, the first 20 are kept."""

    count: int = 0
    findings: list[FieldError] = field(default_factory=list)

    def add(self, row: int, reason: str) -> None:
        """Count a row. `row` 1 is the first row of data, whatever line it stands on."""
        self.count += 1
        if len(self.findings) < LISTED_FAULTS:
            self.findings.append(FieldError(f"row {row}", reason))

    def check(self, valid: int) -> None:
        """Raises FileBroken, with the rows that are not valid, if there are any beside the `valid` ones."""
        if not self.count:
            return
        total, first = valid + self.count, self.findings[0]
        rows = "row is" if self.count == 1 else "rows are"
        listed = f" The first {LISTED_FAULTS} are listed." if self.count > LISTED_FAULTS else ""
        raise FileBroken(
            f"{self.count} of {total} {rows} not valid; {first.pointer}: {first.message}.{listed}",
            hint="Mend or remove these rows and upload the file again.",
            errors=self.findings,
        )


class FirstFault(Faults):
    """Raises FileBroken at the first row that is not valid: for files that were found valid before."""

    def add(self, row: int, reason: str) -> None:
        raise FileBroken(f"row {row}: {reason}", errors=[FieldError(f"row {row}", reason)])
