"""The set of labels that a classifier tells apart: fixed from the training rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from artifacts.errors import FieldError, RequestInvalid
from train.suitability import MAX_LABELS
from train.tasks.rows import RowProblemError

Label = str | int


class Labels:
    """Labels in their order: text by its characters, numbers by size; a label's place is what the model predicts."""

    def __init__(self, found: Iterable[Label]) -> None:
        self.names: tuple[Label, ...] = tuple(sorted(set(found), key=lambda label: (isinstance(label, str), label)))
        self._places: Mapping[Label, int] = {name: place for place, name in enumerate(self.names)}

    @classmethod
    def ordered(cls, names: Sequence[Label]) -> Labels:
        """Labels in the order in which they are given."""
        found = cls(names)
        found.names, found._places = tuple(names), {name: place for place, name in enumerate(names)}
        return found

    def __len__(self) -> int:
        return len(self.names)

    def place(self, label: Label) -> int:
        """Raises RowProblemError when no training row has the label."""
        if label not in self._places:
            raise RowProblemError(f"the label {str(label)[:80]!r} is in no training row")
        return self._places[label]

    def check(self, column: str) -> None:
        """Raises RequestInvalid when there is nothing to tell apart, or too much."""
        problem = None
        if len(self) == 1:
            problem = f"all training rows have the same label, {str(self.names[0])[:80]!r}: nothing to tell apart"
        elif len(self) > MAX_LABELS:
            problem = f"the training rows have {len(self)} labels; at most {MAX_LABELS} are allowed"
        if problem is not None:
            raise RequestInvalid(
                f"{problem[0].upper()}{problem[1:]}.",
                hint=f"Look at the column {column!r}.",
                errors=[FieldError("/dataset", problem)],
            )


def label_of(value: Any, column: str) -> Label:
    """A label: text that is not empty, or a whole number. Raises RowProblemError."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        shown = "missing" if value is None else repr(value)[:80]
        raise RowProblemError(f"`{column}` is {shown}; a label is text or a whole number")
    return value


def of_one_kind(labels: Sequence[Label], first: Label, column: str) -> None:
    """Raises RowProblemError when a label is text although the first was a number, or the other way round."""
    for label in labels:
        if isinstance(label, str) is not isinstance(first, str):
            kinds = "labels are all text, or all numbers"
            raise RowProblemError(f"`{column}` has {label!r}, but the first label is {first!r}: {kinds}")
