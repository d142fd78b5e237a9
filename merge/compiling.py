"""Compiles every compiled loop, or loads it from the cache beside its source, before the first merge has to.

`python -m merge.compiling` does it for an installation; it takes about half a minute, once.
"""

from __future__ import annotations

import numpy as np
import torch

from merge import rules
from merge.catalog import METHODS, parse_parameters
from merge.gram import gram
from merge.kmeans import gram_kmeans
from merge.methods import entrywise, knots, lego
from merge.panel import LANES
from merge.rows import DeltaRows
from merge.stack import Stack

_SIDE, _RANK = 1056, 2
"""Above `merge.row_svd.WHOLE` entries, so that nothing is taken as a whole."""


def compile_loops() -> None:
    """Small merges by every method that has such loops."""
    points = np.random.default_rng(0).normal(size=(6, 3))
    for signed in (False, True):
        gram_kmeans(points @ points.T, np.ones(6), 2, signed=signed)
    numbers = torch.Generator().manual_seed(0)
    stack = Stack(
        A=torch.randn(2 * _RANK, _SIDE, generator=numbers),
        B=torch.randn(_SIDE, 2 * _RANK, generator=numbers),
        owners=torch.arange(2).repeat_interleave(_RANK),
        weights=torch.ones(2 * _RANK, dtype=torch.float64),
        places=torch.arange(_RANK).repeat(2),
        scalings=torch.ones(2 * _RANK, dtype=torch.float64),
    ).ordered()
    stack.best(_RANK)
    for name, row in METHODS.items():
        if row.implementation.startswith((entrywise.__name__, knots.__name__, lego.__name__)):
            row.load()(stack, parse_parameters(name, {}), _RANK)
    DeltaRows.of(stack).energies(stack.owner_weights, 1.0)  # which SCE asks for where many places vary alike
    for columns in (False, True):
        gram(torch.ones(LANES, LANES), columns=columns)
    # masks of plain blocks and random numbers alone, and a row whose sizes short keys do not tell apart
    for dtype in (torch.float32, torch.float64):
        rules.dropped(torch.ones(1, 2, dtype=dtype), 0.5, 0)
    skewed = torch.randn(1, _SIDE, generator=numbers)
    skewed[0, 0] = 1e30
    entrywise.keep_probabilities(skewed, 0.5, 0.1)


if __name__ == "__main__":
    compile_loops()
