"""The parts of a dataset, such as the tasks of a mixture: which row is of which, by the value of one column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from artifacts.errors import FieldError, FileBroken, RequestInvalid

POINTER = "/evaluation/group_column"
MAX_GROUPS = 50
LONGEST = 100
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Groups:
    """The group of every training row and of every measured row, in their order; empty if nothing is grouped.

    Attributes:
        train: also empty if rows are packed, so that a training example is of several groups.
    """

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()


NO_GROUPS = Groups()


@dataclass(slots=True)
class GroupColumn:
    """Notes the group of every row that goes by."""

    column: str
    _found: dict[int, str] = field(default_factory=dict)
    _faults: list[FieldError] = field(default_factory=list)

    def see(self, number: int, row: Mapping[str, Any]) -> None:
        """A row."""
        value = row.get(self.column)
        named = isinstance(value, str | int) and not isinstance(value, bool) and 0 < len(str(value)) <= LONGEST
        if named:
            self._found[number] = str(value)
        elif len(self._faults) < _SHOWN:
            problem = f"{self.column} is no text of 1 to {LONGEST} characters and no whole number"
            self._faults.append(FieldError(f"row {number}", problem))

    def of(self, numbers: Sequence[int]) -> tuple[str, ...]:
        """The groups of these rows.

        Raises:
            FileBroken: rows without a group; the first 20 are named.
            RequestInvalid: more groups than a report could tell apart.
        """
        if self._faults:
            first = self._faults[0]
            raise FileBroken(
                f"The rows can not be grouped by {self.column}: {first.pointer}: {first.message}.",
                hint="Name another column in evaluation.group_column, or leave it out.",
                errors=self._faults,
            )
        groups = set(self._found.values())
        if len(groups) > MAX_GROUPS:
            problem = f"{self.column} has {len(groups)} values; at most {MAX_GROUPS} groups can be told apart"
            raise RequestInvalid(f"{problem}.", errors=[FieldError(POINTER, problem)])
        return tuple(self._found[number] for number in numbers)
