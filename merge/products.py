"""Products of the wide factors of a stack with small matrices, which give a merged module its factors."""

from __future__ import annotations

from torch import Tensor

from merge import product_loops
from merge.panel import COLUMNS, ROWS
from merge.rules import compiled


def of_rows(C: Tensor, A: Tensor) -> Tensor:
    """C·A of C: (k, n), of any dtype, and A: (n, d): (k, d) in the dtype of A."""
    if not compiled(A):
        return C.to(A.dtype) @ A
    k = len(C)
    padded = A.new_zeros(-(-k // ROWS) * ROWS, A.shape[0])
    padded[:k] = C
    result = A.new_empty(len(padded), A.shape[1])
    product_loops.row_product(padded.numpy(), A.numpy(), result.numpy())
    return result[:k]


def of_columns(B: Tensor, C: Tensor) -> Tensor:
    """B·C of B: (d, n) and C: (n, k), of any dtype: (d, k) in the dtype of B."""
    if not compiled(B):
        return B @ C.to(B.dtype)
    k = C.shape[1]
    padded = B.new_zeros(B.shape[1], -(-k // COLUMNS) * COLUMNS)
    padded[:, :k] = C
    result = B.new_empty(B.shape[0], k)
    product_loops.column_product(B.numpy(), padded.numpy(), result.numpy())
    return result


def same_prefixes(X: Tensor) -> bool:
    """Whether a product of X with a part of a small matrix has the bits that the part of the whole product has."""
    return compiled(X)
