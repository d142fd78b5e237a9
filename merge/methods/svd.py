"""Truncated SVD: the best rank-k approximation of the weighted sum (Eckart and Young, 1936), through its n×n core."""

from __future__ import annotations

from merge.coordinates import Product
from merge.options import MergeOptions
from merge.result import MergedModule
from merge.stack import Stack


def merge(stack: Stack, options: MergeOptions, rank: int) -> MergedModule:
    """Merge one module to min(rank, n) components, in order of their singular values."""
    svd = stack.svd(options.scale)
    A, B = stack.best(rank, options.scale)
    return MergedModule(A, B, stack, Product(svd.left[:, :rank] * svd.values[:rank], svd.right[:, :rank].T))
