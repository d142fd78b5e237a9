"""What the methods on single entries make of the entries of all deltas in one place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge import rules, strip_loops


@dataclass(frozen=True, eq=False)
class EntryRule:
    """Some entries are erased by chance, then those of a window are summed, or those of the elected sign.

    Attributes:
        weights, votes, shares: (N,), as in `rules.elected`.
        election: None for a plain sum.
        window: None for all.
        keys, density: of `rules.erased`; a density of 1 erases nothing.
        sizes, least: only places where the variance of sizesᵢ·xᵢ is `least` or more; 0: all.
    """

    weights: Tensor
    votes: Tensor
    shares: Tensor
    election: rules.Election | None = None
    window: rules.Window | None = None
    keys: NDArray[np.uint64] | None = None
    density: float = 1.0
    sizes: Tensor | None = None
    least: float = 0.0

    @classmethod
    def sum(cls, weights: Tensor, window: rules.Window | None = None) -> Self:
        """`rules.weighted_sum`."""
        ones = torch.ones_like(weights)
        return cls(weights, ones, ones, None, window)

    @classmethod
    def elected_sum(cls, weights: Tensor, election: rules.Election, window: rules.Window | None = None) -> Self:
        """`rules.elected_sum`."""
        ones = torch.ones_like(weights)
        return cls(weights, ones, ones, election, window)

    @classmethod
    def elected_mean(
        cls, weights: Tensor, election: rules.Election, *, normalize: bool, window: rules.Window | None = None
    ) -> Self:
        """`rules.elected_mean`."""
        return cls(weights, weights, weights if normalize else torch.zeros_like(weights), election, window)

    def dropping(self, keys: NDArray[np.uint64], density: float) -> Self:
        """The same of what DARE keeps."""
        return replace(self, keys=keys, density=density)

    def __call__(self, row: int, column: int, X: Tensor) -> Tensor:
        """Of a tile X (N, rows, columns) that begins at a row and a column, and may be changed."""
        if self.keys is not None and self.density < 1:
            X = rules.erased(X, self.keys, row, column, self.density)
        if self.election is None:
            result = rules.weighted_sum(X, self.weights, self.window)
        else:
            result = rules.elected(X, self.votes, self.weights, self.shares, self.election, self.window)
        if self.sizes is not None and self.least > 0:
            result *= rules.variance(X, self.sizes) >= self.least
        return result

    def arguments(self) -> tuple[Any, ...]:
        """As `strip_loops.merge` takes them."""
        like, count = torch.empty(0), len(self.weights)
        erases = self.keys is not None and self.density < 1
        rule = {None: strip_loops.SUM, "total": strip_loops.BY_SUM, "frequency": strip_loops.BY_COUNT}[self.election]
        floats = [rules.floats(values, like) for values in (self.votes, self.weights, self.shares)]
        return (
            rule,
            *rules.borders(count, like, self.window),
            *floats,
            self.keys if erases else np.empty(0, np.uint64),
            rules.last_kept(self.density) if erases else np.uint32(0),
            np.empty(0, np.float32) if self.sizes is None else rules.floats(self.sizes, like),
            np.float32(self.least),
        )
