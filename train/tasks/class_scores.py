"""Accuracy, macro F1, Matthews' correlation and loss of a classifier, whatever weights its rows have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from train.evaluation import Scores

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROWS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True)
class ClassScores(Scores):
    """A classifier on all rows, each with one item (a text) or several (its tokens).

    Attributes:
        count: rows.
        classes: how many labels there are.
        row: (items,) the row of each item, ascending.
        truth: (items,) the right class.
        found: (items,) the predicted class.
        nll: (items,) negative log likelihood of the right class, nats.
    """

    count: int
    classes: int
    row: NDArray[np.int64]
    truth: NDArray[np.int64]
    found: NDArray[np.int64]
    nll: NDArray[np.float64]

    @property
    def rows(self) -> int:
        return self.count

    def figures(self, weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Macro F1 is the mean over the classes that are there or were predicted; an undefined quotient is 0."""
        hit = self.truth == self.found
        true, predicted = self._per_class(weights, self.truth), self._per_class(weights, self.found)
        both = self._per_class(weights, self.truth, hit)
        items = true.sum(axis=1)
        right = both.sum(axis=1)
        sums = true + predicted
        f1 = 2 * both / np.maximum(sums, 1)
        present = (sums > 0).sum(axis=1)
        # Gorodkin (2004), equation 8: the correlation of two assignments to several classes.
        spread = (items**2 - (predicted**2).sum(axis=1)) * (items**2 - (true**2).sum(axis=1))
        shared = right * items - (true * predicted).sum(axis=1)
        return {
            "loss": weights @ np.bincount(self.row, self.nll, self.count) / items,
            "accuracy": right / items,
            "macro_f1": f1.sum(axis=1) / present,
            "mcc": np.where(spread > 0, shared / np.sqrt(np.maximum(spread, 1)), 0.0),
        }

    def _per_class(
        self, weights: NDArray[np.float64], classes: NDArray[np.int64], chosen: NDArray[np.bool_] | None = None
    ) -> NDArray[np.float64]:
        """(weightings, classes): how many items have a class; of the chosen ones only, if some are chosen."""
        row, kinds = (self.row, classes) if chosen is None else (self.row[chosen], classes[chosen])
        total = np.zeros((len(weights), self.classes))
        for start in range(0, self.count, _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, self.count)
            first, last = np.searchsorted(row, [start, stop])
            places = (row[first:last] - start) * self.classes + kinds[first:last]
            counts = np.bincount(places, minlength=(stop - start) * self.classes)
            total += weights[:, start:stop] @ counts.reshape(stop - start, self.classes).astype(np.float64)
        return total

    def to_lists(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "classes": self.classes,
            "row": self.row.tolist(),
            "truth": self.truth.tolist(),
            "found": self.found.tolist(),
            "nll": self.nll.tolist(),
        }

    @classmethod
    def of(cls, columns: Any) -> ClassScores:
        """From what `to_lists` gave."""
        whole = {name: np.array(columns[name], np.int64) for name in ("row", "truth", "found")}
        return cls(columns["count"], columns["classes"], **whole, nll=np.array(columns["nll"], np.float64))
