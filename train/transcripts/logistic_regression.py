"""Logistic regression with an L2 penalty, by Newton's method: what a classifier is held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STEPS = 100
_TOLERANCE = 1e-10


@dataclass(frozen=True, slots=True)
class LogisticRegression:
    """log(p/(1 − p)) = weights·z + bias, with z the features, each less its mean and over its deviation.

    Attributes:
        mean, deviation, weights: (features,).
    """

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]
    weights: NDArray[np.float64]
    bias: float

    def logits(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """(rows,) of (rows, features)."""
        found: NDArray[np.float64] = (features - self.mean) / self.deviation @ self.weights + self.bias
        return found


def fit(features: NDArray[np.float64], truth: NDArray[np.int64], penalty: float = 1.0) -> LogisticRegression:
    """The minimum of Σ log(1 + e^(−y·logit)) + penalty/2·‖weights‖², which is one and the same from any start.

    Args:
        features: (rows, features).
        truth: (rows,) 0 or 1, both of them there.
    """
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    inputs = np.column_stack([(features - mean) / deviation, np.ones(len(features))])
    ridge = np.full(inputs.shape[1], penalty)
    ridge[-1] = 0.0
    point = np.zeros(inputs.shape[1])
    value = _loss(inputs, truth, ridge, point)
    for _ in range(_STEPS):
        chance = _chance(inputs @ point)
        slope = inputs.T @ (chance - truth) + ridge * point
        curvature = (inputs * (chance * (1 - chance))[:, None]).T @ inputs + np.diag(ridge)
        step = np.linalg.lstsq(curvature, slope, rcond=None)[0]
        size = 1.0
        while (new := _loss(inputs, truth, ridge, point - size * step)) > value and size > _TOLERANCE:
            size /= 2
        if value - new <= _TOLERANCE * (1 + abs(value)):
            break
        point, value = point - size * step, new
    return LogisticRegression(mean, deviation, point[:-1], float(point[-1]))


def _chance(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = 0.5 * (1 + np.tanh(logits / 2))  # no overflow, however large they are
    return found


def _loss(
    inputs: NDArray[np.float64], truth: NDArray[np.int64], ridge: NDArray[np.float64], point: NDArray[np.float64]
) -> float:
    logits = inputs @ point
    return float(np.logaddexp(0, logits).sum() - logits @ truth + 0.5 * (ridge * point**2).sum())
