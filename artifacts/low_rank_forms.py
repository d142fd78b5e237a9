"""Adapters of other forms as B·A, exactly: what AdaLoRA, VeRA, LoHa, LoKr and LQ-LoRA add, without a dense matrix.

Every function gives A: (k, d_in) and B: (d_out, k) with B·A = ΔW, the adapter's scaling included.
"""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""A: (k, d_in) and B: (d_out, k)."""


def adalora(A: Tensor, B: Tensor, E: Tensor, scaling: float) -> Pair:
    """ΔW = scaling·B·diag(E)·A (AdaLoRA, arXiv:2303.10512, eq. 3); components whose E is 0 are left out.

    Args:
        A: (r, d_in); B: (d_out, r); E: (r, 1), the singular values.
    """
    kept = E[:, 0] != 0
    return (A * E)[kept], B[:, kept] * scaling


def vera(A: Tensor, B: Tensor, d: Tensor, b: Tensor, d_in: int) -> Pair:
    """ΔW = diag(b)·B·diag(d)·A (VeRA, arXiv:2310.11454, eq. 2), of the parts of A and B that the layer uses.

    Args:
        A: (r, at least d_in) and B: (at least d_out, r), shared by all layers; d: (r,); b: (d_out,).
    """
    return A[:, :d_in] * d[:, None], B[: b.shape[0]] * b[:, None]


def loha(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, scaling: float) -> Pair:
    """ΔW = scaling·(W1a·W1b)∘(W2a·W2b) (FedPara, arXiv:2108.06098), of rank at most r₁·r₂.

    An entry is Σ_p Σ_q W1a[o,p]·W2a[o,q] · W1b[p,i]·W2b[q,i]: a product of the Kronecker products of rows with those of
    columns.

    Args:
        w1_a: (d_out, r₁); w1_b: (r₁, d_in); w2_a: (d_out, r₂); w2_b: (r₂, d_in).
    """
    B = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1)
    A = (w1_b[:, None, :] * w2_b[None, :, :]).flatten(0, 1)
    return A, B * scaling


def lokr(w1: Pair, w2: Pair, scaling: float) -> Pair:
    """ΔW = scaling·W1⊗W2 (LoKr, arXiv:2309.14859) of factored W1 = L1·R1 and W2 = L2·R2: (L1⊗L2)·(R1⊗R2).

    Args:
        w1, w2: (R, L) of each; see `factored`.
    """
    (R1, L1), (R2, L2) = w1, w2
    return torch.kron(R1.contiguous(), R2.contiguous()), torch.kron(L1.contiguous(), L2.contiguous()) * scaling


def difference(trained: Pair, start: Pair, scaling: float) -> Pair:
    """ΔW = scaling·(B·A − B₀·A₀): what a training added to factors that did not begin at 0.

    Args:
        trained: A (r, d_in) and B (d_out, r); start: A₀ and B₀ of the same sizes.
    """
    (A, B), (A0, B0) = trained, start
    return torch.cat([A, A0]), torch.cat([B, -B0], dim=1) * scaling


def factored(whole: Tensor | None, left: Tensor | None, right: Tensor | None) -> Pair:
    """(R, L) with L·R the matrix, of the smallest size that needs no arithmetic.

    Args:
        whole: the matrix itself, or None where it is stored as left·right.
    """
    if whole is None:
        assert left is not None
        assert right is not None
        rows, columns, rank = left.shape[0], right.shape[1], right.shape[0]
        if rank <= min(rows, columns):
            return right, left
        whole = left @ right
    eye = torch.eye(min(whole.shape), dtype=whole.dtype)
    return (whole, eye) if whole.shape[0] <= whole.shape[1] else (eye, whole)
