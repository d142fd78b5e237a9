"""What a model does on rows that it was not trained on, and how sure a difference between two models is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from train.settings import EvaluationSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray

_RESAMPLED_AT_ONCE = 4_000_000


class Scores(ABC):
    """One model on all rows. Every figure is a function of the rows, each of which may count several times."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """How many there are."""

    @abstractmethod
    def figures(self, weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Every figure for several weightings of the rows.

        Args:
            weights: (weightings, rows) how often a row counts.

        Returns:
            Name → (weightings,) values.
        """

    @abstractmethod
    def to_lists(self) -> dict[str, Any]:
        """JSON from which the task makes the same scores (`train.tasks.protocol.Task.scores_of`)."""

    def to_dict(self) -> dict[str, float]:
        """Every figure, each row counted once."""
        return {name: float(value[0]) for name, value in self.figures(np.ones((1, self.rows))).items()}


@dataclass(frozen=True, slots=True)
class Difference:
    """After minus before, with the 95 % interval of the paired bootstrap over rows."""

    difference: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def compare(before: Scores, after: Scores, settings: EvaluationSettings, seed: int) -> dict[str, dict[str, float]]:
    """The differences with their intervals: the same rows are drawn, with replacement, for both models."""
    return compare_means([(before, after)], settings, seed)


def compare_means(
    pairs: Sequence[tuple[Scores, Scores]], settings: EvaluationSettings, seed: int
) -> dict[str, dict[str, float]]:
    """As `compare`, of the means over several sets of rows, which count alike whatever their sizes.

    Args:
        pairs: of each set the scores before and after; rows are drawn from each set apart.
    """
    generator = np.random.default_rng(seed)
    drawn = [_drawn(before, after, settings.bootstrap, generator) for before, after in pairs]
    found = {}
    for name in drawn[0]:
        low, high = np.quantile(np.mean([values[name] for values in drawn], axis=0), [0.025, 0.975])
        difference = float(np.mean([after.to_dict()[name] - before.to_dict()[name] for before, after in pairs]))
        found[name] = Difference(difference, float(low), float(high)).to_dict()
    return found


def _drawn(
    before: Scores, after: Scores, bootstrap: int, generator: np.random.Generator
) -> dict[str, NDArray[np.float64]]:
    """The difference of every figure in every resample of the rows."""
    rows = before.rows
    at_once = max(1, _RESAMPLED_AT_ONCE // rows)
    drawn: dict[str, list[NDArray[np.float64]]] = {}
    for start in range(0, bootstrap, at_once):
        size = min(at_once, bootstrap - start)
        weights = generator.multinomial(rows, np.full(rows, 1 / rows), size=size).astype(np.float64)
        first, second = before.figures(weights), after.figures(weights)
        for name, value in second.items():
            drawn.setdefault(name, []).append(value - first[name])
    return {name: np.concatenate(values) for name, values in drawn.items()}


def by_group(before: Scores, after: Scores, groups: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The figures of each group alone: {rows, before, after, difference}.

    Args:
        groups: of every row.
    """
    found = {}
    for name in sorted(set(groups)):
        weights = np.array([[float(group == name) for group in groups]])
        first, second = (
            {figure: float(value[0]) for figure, value in scores.figures(weights).items()} for scores in (before, after)
        )
        found[name] = {
            "rows": int(weights.sum()),
            "before": first,
            "after": second,
            "difference": {figure: second[figure] - value for figure, value in first.items()},
        }
    return found
