"""The rows of a dataset, split by the hash of each row, and the examples that a task makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.errors import FieldError, RequestInvalid
from train.groups import NO_GROUPS, GroupColumn, Groups
from train.rows import Format, iter_rows
from train.settings import EvaluationSettings
from train.splits import split_of


@dataclass(frozen=True, slots=True)
class DataFile:
    """A dataset's file."""

    path: Path
    format: Format


@dataclass(frozen=True, slots=True)
class Examples:
    """What is trained on, what is measured on, and what the report says of both."""

    train: tuple[Any, ...]
    validation: tuple[Any, ...]
    report: dict[str, Any]
    groups: Groups = NO_GROUPS


class SplitRows:
    """The rows of a file with their numbers from 1; which are held out is known once they went by."""

    def __init__(self, file: DataFile, fraction: float, group_column: str | None = None) -> None:
        self._file, self._fraction = file, fraction
        self._groups = None if group_column is None else GroupColumn(group_column)
        self.held_out: set[int] = set()

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Raises FileBroken: a row is not valid after all."""
        for number, row in enumerate(iter_rows(self._file.path, self._file.format), 1):
            if split_of(row, self._fraction) == "validation":
                self.held_out.add(number)
            if self._groups is not None:
                self._groups.see(number, row)
            yield number, row

    def parted(self, numbers: Sequence[int], examples: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The examples of these rows: (those to train on, those held out).

        Raises:
            RequestInvalid: no row is left to train on, or none to measure with although a fraction was asked for.
        """
        pairs = list(zip(numbers, examples, strict=True))
        train = tuple(example for number, example in pairs if number not in self.held_out)
        validation = tuple(example for number, example in pairs if number in self.held_out)
        check_enough(train, "training")
        if self._fraction:
            check_enough(validation, "validation")
        return train, validation

    def groups(self, numbers: Sequence[int], measured: int, *, packed: bool = False) -> Groups:
        """The groups of these rows, in the order in which `parted` has them.

        Args:
            measured: how many of the rows that are held out are measured at most.

        Raises:
            FileBroken, RequestInvalid: see `train.groups.GroupColumn.of`.
        """
        if self._groups is None:
            return NO_GROUPS
        pairs = list(zip(numbers, self._groups.of(numbers), strict=True))
        train = () if packed else tuple(group for number, group in pairs if number not in self.held_out)
        return Groups(train, tuple(group for number, group in pairs if number in self.held_out)[:measured])


def check_enough(examples: Sequence[Any], what: str) -> None:
    """Raises RequestInvalid when no row is left."""
    if not examples:
        raise RequestInvalid(
            f"No {what} row is left.",
            hint="The dataset is too small for this validation_fraction, or all its rows were too long.",
            errors=[FieldError("/dataset", f"no {what} row")],
        )


def counts(
    train: Sequence[Any], validation: Sequence[Any], evaluation: EvaluationSettings, **more: Any
) -> dict[str, Any]:
    """What every report says of the rows, and what the task adds."""
    return {
        "training_rows": len(train),
        "validation_rows": len(validation),
        "measured_rows": min(len(validation), evaluation.max_rows),
        **more,
    }


def listed(numbers: Sequence[int]) -> dict[str, Any]:
    """How many, and the first twenty."""
    return {"count": len(numbers), "first": list(numbers[:20])}
