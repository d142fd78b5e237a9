"""Rows that become examples one by one: the bad ones named, the long ones refused, left out or cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from artifacts.errors import FieldError, FileBroken

IGNORED = -100
"""The label that a loss leaves out."""
SHOWN_ROWS = 20


class RowProblemError(Exception):
    """A row that can not be used; the message completes "row 7: …"."""


class Encodable(Protocol):
    """An example of so many tokens, of which the loss counts so many."""

    @property
    def length(self) -> int: ...

    @property
    def counted(self) -> int: ...


E = TypeVar("E", bound=Encodable)


@dataclass(frozen=True, slots=True)
class Encoded(Generic[E]):
    """Rows as examples, with their numbers; `dropped` are the numbers of those that were too long, `cut` those cut."""

    examples: tuple[E, ...]
    numbers: tuple[int, ...]
    dropped: tuple[int, ...] = ()
    cut: tuple[int, ...] = ()


class RowFaults:
    """Rows that can not be used: all are counted, the first 20 are kept."""

    def __init__(self) -> None:
        self.count = 0
        self.findings: list[FieldError] = []

    def add(self, number: int, problem: str) -> None:
        self.count += 1
        if len(self.findings) < SHOWN_ROWS:
            self.findings.append(FieldError(f"row {number}", problem))

    def check(self, hint: str) -> None:
        """Raises FileBroken if there are any."""
        if self.findings:
            rows = "row" if self.count == 1 else "rows"
            first = self.findings[0]
            raise FileBroken(
                f"{self.count} {rows} of the dataset can not be used; the first is {first.pointer}: {first.message}.",
                hint=hint,
                errors=self.findings,
            )


def encode_rows(
    rows: Iterable[tuple[int, Mapping[str, Any]]],
    encode: Callable[[Mapping[str, Any], int | None], E],
    overlong: str,
    limit: int,
) -> Encoded[E]:
    """Encode numbered rows.

    Args:
        encode: (row, None) → an example; (row, limit) → one that is cut to so many tokens. Raises RowProblemError.
        overlong: "error", "drop" or "truncate": what becomes of rows over the limit.
        limit: the longest row, tokens.

    Raises:
        FileBroken: rows that lack what the task needs, that are too long (with overlong="error"), or in which the
            loss would count nothing; the first 20 are named, with their number in all.
    """
    examples: list[E] = []
    numbers: list[int] = []
    dropped: list[int] = []
    cut: list[int] = []
    faults = RowFaults()
    for number, row in rows:
        try:
            example = encode(row, None)
            if example.length > limit and overlong == "error":
                raise RowProblemError(f"{example.length} tokens, {limit} are allowed")
            if example.length > limit and overlong == "drop":
                dropped.append(number)
                continue
            if example.length > limit:
                cut.append(number)
                example = encode(row, limit)
            if example.counted == 0:
                raise RowProblemError("nothing is left that the loss could count")
        except RowProblemError as error:
            faults.add(number, str(error))
        else:
            examples.append(example)
            numbers.append(number)
    faults.check("Correct them, raise task.max_length, or choose task.overlong drop or truncate.")
    return Encoded(tuple(examples), tuple(numbers), tuple(dropped), tuple(cut))


def row_limit(max_length: int, config: Any) -> int:
    """The longest row: what is asked for, or what the base model was made for."""
    made_for = getattr(config, "max_position_embeddings", None)
    return max_length if made_for is None else min(max_length, int(made_for))
