"""The numbers of a pair that is written: factors as stored, brought together, cut, rounded, and what that loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from artifacts.float_codes import Array, decode, encode
from artifacts.float_dtypes import is_float
from artifacts.formats.pairs import Pair
from artifacts.manifest import LoraModule
from artifacts.safetensors_header import TensorInfo

ReadTensor = Callable[[str], tuple[TensorInfo, bytes]]
"""Key of the stored file → its entry in the header and its bytes."""


def whole(pair: Pair, read: ReadTensor) -> tuple[Array, Array]:
    """A: (full_rank, d_in) and B: (d_out, full_rank) with every factor but `common` in B, before any cut."""
    made: list[Array] = []
    B = np.zeros((pair.d_out, pair.full_rank), np.float32)
    row = column = 0
    for block in pair.blocks:
        if block.module is not None:
            a, b = factors(block.module, read)
            B = B.astype(np.promote_types(B.dtype, b.dtype), copy=False)
            if not pair.shared or not made:
                made.append(a)
            width = a.shape[0]
            factor = block.module.scaling / pair.common
            B[row : row + block.rows, column : column + width] = b if factor == 1.0 else b * b.dtype.type(factor)
            column += 0 if pair.shared else width
        row += block.rows
    if pair.swap:
        B = np.concatenate([B[pair.d_out // 2 :], B[: pair.d_out // 2]])
    if pair.head_rows:
        B = B.reshape(-1, 2, pair.head_rows // 2, B.shape[1]).swapaxes(1, 2).reshape(B.shape)
    return (made[0] if len(made) == 1 else np.concatenate(made)), B


def written(pair: Pair, read: ReadTensor) -> tuple[Array, Array]:
    """A: (rank, d_in) and B: (d_out, rank), not yet rounded; ΔW = `scaling`·B·A."""
    A, B = whole(pair, read)
    if pair.truncated:
        return cut(A, B, pair.common, pair.rank)
    factor = pair.common / pair.scaling
    return A, B if factor == 1.0 else B * B.dtype.type(factor)


def encoded(pair: Pair, read: ReadTensor, dtype: str) -> tuple[bytes, bytes]:
    """A and B, as they stand in the file."""
    A, B = written(pair, read)
    return encode(A.T if pair.a_turned else A, dtype), encode(B, dtype)


def deviation(pair: Pair, read: ReadTensor, dtype: str) -> tuple[float, float, bool]:
    """‖ΔW − ΔW'‖² and ‖ΔW‖² of what is written, and whether a number became infinite that was not."""
    A, B = (item.astype(np.float64) for item in whole(pair, read))
    new_a, new_b = written(pair, read)
    near_a = decode(encode(new_a, dtype), dtype).astype(np.float64).reshape(new_a.shape)
    near_b = decode(encode(new_b, dtype), dtype).astype(np.float64).reshape(new_b.shape)
    finite = bool(np.isfinite(A).all() and np.isfinite(B).all())
    overflow = finite and not (np.isfinite(near_a).all() and np.isfinite(near_b).all())
    if overflow:
        return math.inf, math.inf, True
    if not pair.truncated:
        # s·B·A − s'·B'·A' = X·A + Y·Z with X = s·B − s'·B', Y = s'·B', Z = A − A': X and Z are small themselves, so
        # nothing cancels in their products
        X, Y, Z = pair.common * B - pair.scaling * near_b, pair.scaling * near_b, A - near_a
        gone = _inner(X, X, A, A) + 2 * _inner(X, Y, A, Z) + _inner(Y, Y, Z, Z)
        return max(gone, 0.0), pair.common**2 * _inner(B, B, A, A), False
    # through triangles: the difference of two products must not drown in their squares
    left: Array = np.linalg.qr(np.concatenate([pair.common * B, -pair.scaling * near_b], axis=1)).R
    right: Array = np.linalg.qr(np.concatenate([A, near_a]).T).R
    r = pair.full_rank
    return (
        float(np.linalg.norm(left @ right.T) ** 2),
        float(np.linalg.norm(left[:, :r] @ right[:, :r].T) ** 2),
        False,
    )


def _inner(B: Array, D: Array, A: Array, C: Array) -> float:
    """⟨B·A, D·C⟩, by the small matrices BᵀD and ACᵀ."""
    return float(((B.T @ D) * (A @ C.T)).sum())


def cut(A: Array, B: Array, scaling: float, rank: int) -> tuple[Array, Array]:
    """The nearest scaling·B·A of a smaller rank (Eckart and Young, 1936), its singular values shared evenly.

    Returns:
        A: (rank, d_in) and B: (d_out, rank) in float64, with scaling 1.
    """
    left, core_left = np.linalg.qr(B.astype(np.float64))
    right, core_right = np.linalg.qr(A.astype(np.float64).T)
    U, sigma, Vt = np.linalg.svd(scaling * core_left @ core_right.T)
    rank_here = min(rank, len(sigma))
    root = np.sqrt(sigma[:rank_here])
    new_a, new_b = (root[:, None] * Vt[:rank_here]) @ right.T, (left @ U[:, :rank_here]) * root
    missing = rank - rank_here  # a side of the layer is smaller than the rank
    return np.pad(new_a, ((0, missing), (0, 0))), np.pad(new_b, ((0, 0), (0, missing)))


def factors(module: LoraModule, read: ReadTensor) -> tuple[Array, Array]:
    """A: (r, d_in) and B: (d_out, r) of a module out of the stored tensors, as `Adapter.factors` gives them."""
    A, B = (_tensor(read(key)) for key in (module.a_key, module.b_key))
    if module.transposed:
        A, B = A.T, B.T
    if module.head_rows:
        B = B.reshape(-1, module.head_rows // 2, 2, B.shape[1]).swapaxes(1, 2).reshape(B.shape)
    if module.b_rows:
        B = np.concatenate([B[start:stop] for start, stop in module.b_rows])
    if module.rank_span is not None:
        start, stop = module.rank_span
        A, B = A[start:stop], B[:, start:stop]
    if module.mid_key is not None:
        core = _tensor(read(module.mid_key)).astype(np.float32)
        A = np.einsum("abkl,bi->aikl", core, A.reshape(A.shape[0], -1).astype(np.float32))
    return A.reshape(module.rank, -1), B.reshape(-1, module.rank)


def relative_error(pairs: Iterable[Pair], read: ReadTensor, dtype: str) -> tuple[float | None, str]:
    """‖ΔW − ΔW'‖ / ‖ΔW‖ over all modules (None where it is no number), and the first pair that `dtype` can not hold."""
    gone = total = 0.0
    for pair in pairs:
        lost, energy, overflow = deviation(pair, read, dtype)
        if overflow:
            return None, pair.modules[0].path
        gone, total = gone + lost, total + energy
    ratio = math.sqrt(gone / total) if total > 0 else 0.0
    return (ratio if math.isfinite(ratio) else None), ""


def _tensor(found: tuple[TensorInfo, bytes]) -> Array:
    info, raw = found
    return decode(raw, info.dtype).reshape(info.shape)


def rounding_error(tensors: Iterable[TensorInfo], read: ReadTensor, dtype: str) -> tuple[float | None, str]:
    """The relative error of all numbers together, and the first tensor that the dtype can not hold."""
    gone = total = 0.0
    for info in tensors:
        if not is_float(info.dtype):
            continue
        numbers = decode(read(info.name)[1], info.dtype).astype(np.float64)
        near = decode(encode(numbers, dtype), dtype).astype(np.float64)
        if (np.isfinite(numbers) & ~np.isfinite(near)).any():
            return None, info.name
        gone, total = gone + float(((numbers - near) ** 2).sum()), total + float((numbers**2).sum())
    ratio = math.sqrt(gone / total) if total > 0 else 0.0
    return (ratio if math.isfinite(ratio) else None), ""
