"""What a classifier of transcripts reaches: of all views, and of whole and of partial transcripts by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from train.evaluation import Scores

if TYPE_CHECKING:
    from numpy.typing import NDArray

VIEWS = ("full", "partial")


@dataclass(frozen=True, slots=True)
class TranscriptScores(Scores):
    """A classifier on transcripts, each with one view or both: the views of a transcript are resampled together.

    Attributes:
        count: transcripts.
        row: (views,) the transcript of each view.
        view: (views,) 0 for the whole transcript, 1 for its reading frame (`VIEWS`).
        truth: (views,) 1 for non-coding, 0 for coding.
        logit: (views,) log-odds of non-coding that the classifier gives.
    """

    count: int
    row: NDArray[np.int64]
    view: NDArray[np.int64]
    truth: NDArray[np.int64]
    logit: NDArray[np.float64]

    @property
    def rows(self) -> int:
        return self.count

    def figures(self, weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Of all views, and under full_… and partial_… of each view alone, if there are both.

        An undefined quotient is 0; an AUROC of views of one class is 0.5.
        """
        found = self._figures(weights, np.ones(len(self.row), bool))
        seen = np.unique(self.view)
        if len(seen) > 1:
            for place in seen:
                part = self._figures(weights, self.view == place)
                found |= {f"{VIEWS[place]}_{name}": value for name, value in part.items()}
        return found

    def _figures(self, weights: NDArray[np.float64], chosen: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
        each = weights[:, self.row[chosen]]
        truth, logit = self.truth[chosen], self.logit[chosen]
        said = logit > 0
        hits, misses = each @ (said & (truth == 1)), each @ (~said & (truth == 1))
        alarms, passes = each @ (said & (truth == 0)), each @ (~said & (truth == 0))
        total = each.sum(axis=1)
        f1, other_f1 = _over(2 * hits, 2 * hits + misses + alarms), _over(2 * passes, 2 * passes + misses + alarms)
        spread = (hits + alarms) * (hits + misses) * (passes + alarms) * (passes + misses)
        return {
            "loss": _over(each @ np.logaddexp(0, np.where(truth == 1, -logit, logit)), total),
            "accuracy": _over(hits + passes, total),
            "sensitivity": _over(hits, hits + misses),
            "specificity": _over(passes, passes + alarms),
            "precision": _over(hits, hits + alarms),
            "f1": f1,
            "macro_f1": (f1 + other_f1) / 2,
            "mcc": _over(hits * passes - misses * alarms, np.sqrt(spread)),
            "auroc": _auroc(each, truth, logit),
        }

    def to_lists(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "row": self.row.tolist(),
            "view": self.view.tolist(),
            "truth": self.truth.tolist(),
            "logit": self.logit.tolist(),
        }

    @classmethod
    def of(cls, columns: Any) -> TranscriptScores:
        """From what `to_lists` gave."""
        whole = {name: np.array(columns[name], np.int64) for name in ("row", "view", "truth")}
        return cls(columns["count"], **whole, logit=np.array(columns["logit"], np.float64))


def _over(value: NDArray[np.float64], by: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(by > 0, value / np.where(by > 0, by, 1.0), 0.0)


def _auroc(weights: NDArray[np.float64], truth: NDArray[np.int64], logit: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of pairs (one of class 1, one of class 0) in which the first has more log-odds; a tie is half."""
    order = np.argsort(logit, kind="stable")
    steps = np.flatnonzero(np.diff(logit[order], prepend=-np.inf) > 0)
    ones = np.add.reduceat(weights[:, order] * truth[order], steps, axis=1)
    zeros = np.add.reduceat(weights[:, order] * (1 - truth[order]), steps, axis=1)
    below = np.cumsum(zeros, axis=1) - zeros
    pairs = ones.sum(axis=1) * zeros.sum(axis=1)
    won = (ones * (below + zeros / 2)).sum(axis=1)
    return np.where(pairs > 0, won / np.where(pairs > 0, pairs, 1.0), 0.5)
