"""Products of the wide factors of a stack with small matrices, which give a merged module its factors."""

from __future__ import annotations

from torch import Tensor

from merge import product_loops
from merge.panel import ROWS
from merge.rules import compiled


def of_rows(C: Tensor, A: Tensor) -> Tensor:
    """C·A of C: (k, n), of any dtype, and A: (n, d): (k, d) in the dtype of A."""
    if not compiled(A):
        return C.to(A.dtype) @ A
    padded = _padded(C, A)
    result = A.new_empty(len(padded), A.shape[1])
    product_loops.row_product(padded.numpy(), A.numpy(), result.numpy())
    return result[: len(C)]


def of_columns(B: Tensor, C: Tensor) -> Tensor:
    """B·C of B: (d, n) and C: (n, k), of any dtype: (d, k) in the dtype of B."""
    if not compiled(B):
        return B @ C.to(B.dtype)
    result = B.new_empty(B.shape[0], C.shape[1])
    product_loops.column_product(B.numpy(), _padded(C.T, B).numpy(), result.numpy())
    return result


def same_prefixes(X: Tensor) -> bool:
    """Whether a product of X with a part of a small matrix has the bits that the part of the whole product has."""
    return compiled(X)


def _padded(C: Tensor, X: Tensor) -> Tensor:
    """C: (k, n) in the dtype of X, with rows of zeros up to a multiple of ROWS."""
    padded = X.new_zeros(-(-len(C) // ROWS) * ROWS, C.shape[1])
    padded[: len(C)] = C
    return padded
