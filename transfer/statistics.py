"""The figures of a transfer's report, each from plain numbers. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NORMAL_975 = 1.959963984540054
"""The 97.5 % point of the standard normal distribution."""
_RESAMPLED_AT_ONCE = 4_000_000


@dataclass(frozen=True, slots=True)
class Rate:
    """A share with its 95 % interval."""

    rate: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def wilson(successes: int, trials: int) -> Rate | None:
    """The share of successes with Wilson's interval (doi:10.1080/01621459.1927.10502953); None without a trial."""
    if trials == 0:
        return None
    z, share = _NORMAL_975, successes / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == trials else (centre + half) / scale
    return Rate(share, low, high)


def auc(positives: Sequence[float], negatives: Sequence[float]) -> float | None:
    """The chance that a positive scores higher than a negative, ties half; None when there are none of either."""
    if not positives or not negatives:
        return None
    ordered = np.sort(np.array(negatives, np.float64))
    scores = np.array(positives, np.float64)
    below = np.searchsorted(ordered, scores, side="left")
    through = np.searchsorted(ordered, scores, side="right")
    return float((below + through).sum() / (2 * len(scores) * len(ordered)))


def squared_mmd(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """MMD² of two samples (n, d) and (m, d), the biased estimate (Gretton et al. 2012, eq. 5), which is never negative.

    The kernel is Gaussian with the median of all distances as its width, so that the scale of the features is nothing.
    """
    points = np.concatenate([first, second])
    norms = (points * points).sum(axis=1)
    squared = np.maximum(norms[:, None] + norms[None, :] - 2 * points @ points.T, 0.0)
    median = float(np.median(squared[np.triu_indices(len(points), 1)]))
    kernel = np.exp(-squared / (2 * median)) if median > 0 else (squared == 0).astype(np.float64)
    n = len(first)
    value = kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
    return max(float(value), 0.0)


def bootstrap_lead(
    outcomes: Sequence[float], rivals: Sequence[Sequence[float]], resamples: int, seed: int
) -> tuple[float, float, float]:
    """How far a mean is above the best of its rivals' means, with the 95 % interval of the paired bootstrap.

    In every resample the same items are drawn for all, and the rival that is best there is the one compared with.

    Args:
        outcomes: (items,); each rival has as many.

    Returns:
        (lead, low, high).
    """
    own = np.array(outcomes, np.float64)
    others = np.array(rivals, np.float64)
    items = len(own)
    generator = np.random.default_rng(seed)
    at_once = max(1, _RESAMPLED_AT_ONCE // items)
    drawn = []
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        weights = generator.multinomial(items, np.full(items, 1 / items), size=size) / items
        drawn.append(weights @ own - (weights @ others.T).max(axis=1))
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
    # Sums of thirds and sevenths miss 0 and 1 by a rounding, which must not decide on which side of -ε a bound lies.
    lead, low, high = np.round([own.mean() - others.mean(axis=1).max(), low, high], 12) + 0.0
    return float(lead), float(low), float(high)
