"""Gram matrices of the wide factors, which every merge needs before anything else."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from artifacts import algebra
from merge import gram_loops
from merge.panel import COLUMNS, LANES
from merge.rules import compiled


def gram(X: Tensor, *, columns: bool = False) -> Tensor:
    """(n, n) float64 inner products of the rows (or columns) of X, as `artifacts.algebra.gram`.

    Of contiguous float32 on a CPU by compiled loops: sums of `gram_loops.MOST_TERMS` products in float32, which are
    added in float64.
    """
    count = X.shape[1 if columns else 0]
    if not compiled(X) or count < LANES:
        return algebra.gram(X, columns=columns)
    width = -(-count // COLUMNS) * COLUMNS
    result = np.zeros((width, width))
    (gram_loops.column_gram if columns else gram_loops.row_gram)(X.numpy(), result)
    return torch.from_numpy(result)[:count, :count].contiguous()
