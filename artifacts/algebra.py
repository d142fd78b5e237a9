"""Exact algebra on stacked LoRA factors, without ever forming a d_out×d_in matrix.

A *stack* holds the rank components of one module of one or several adapters, scalings folded in: the rows aᵢ of
A: (n, d_in) and the columns bᵢ of B: (d_out, n), so that Σᵢ wᵢ·bᵢaᵢᵀ = B·diag(w)·A. All that a merge needs of the wide
dimensions are the Gram matrices G_A = AAᵀ and G_B = BᵀB, both n×n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SPARE_VECTORS = 4

SAFE_INVERSE = 900.0
"""How large ‖T⁻¹‖²_F − n may be for the Cholesky factor T of a unit-diagonal Gram matrix to stand in for a QR factor.

The smallest singular value of T is then at least about 1/30. A float32 Gram matrix is exact to about 1e-7, so what is
lost of ΔW stays near 1e-6 of its norm; beyond, columns are nearly collinear and Householder QR is used."""


def gram(stack: Tensor, *, columns: bool = False) -> Tensor:
    """(n, n) float64 inner products of the rows (or columns) of a stack, computed in the stack's own precision."""
    X = stack.T if columns else stack
    n = X.shape[0]
    result = torch.empty(n, n, dtype=torch.float64, device=X.device)
    # A Gram matrix is symmetric: of its blocks, those below the diagonal are never computed.
    step = max(-(-n // (4 if n >= 64 else 2)), 1)
    for first in range(0, n, step):
        last = first + step
        rows = torch.mm(X[first:last], X[first:].T)
        result[first:last, first:] = rows
        result[first:, first:last] = rows.T
    return result


@dataclass(frozen=True, slots=True, eq=False)
class CoreSvd:
    """The SVD of Σᵢ wᵢ·bᵢaᵢᵀ = U·diag(σ)·Vᵀ, held as coordinates in the stacks.

    Attributes:
        values: (n,) singular values σ, descending, float64.
        left: (n, n) float64; U = B·left.
        right: (n, n) float64; V = Aᵀ·right.
    """

    values: Tensor
    left: Tensor
    right: Tensor

    def halves(self, rank: int) -> tuple[Tensor, Tensor]:
        """(rank, n) and (n, rank) with which halves[0]·A and B·halves[1] are its best factors, √σ on either side."""
        root = self.values[:rank].sqrt()
        return (self.right[:, :rank] * root).T, self.left[:, :rank] * root


def core_svd(A: Tensor, B: Tensor, weights: Tensor, gram_A: Tensor, gram_B: Tensor) -> CoreSvd:
    """Exact SVD of B·diag(w)·A through the n×n core T_B·diag(w)·T_Aᵀ, where B = Q_B·T_B and Aᵀ = Q_A·T_A.

    Args:
        A: (n, d_in); B: (d_out, n); weights: (n,).
        gram_A, gram_B: (n, n) float64 Gram matrices of the rows of A and the columns of B.
    """
    T_A, solve_A = triangular(A.T, gram_A)
    T_B, solve_B = triangular(B, gram_B)
    U, S, V = small_svd(core_matrix(T_A, T_B, weights))
    return CoreSvd(S, solve_B @ U, solve_A @ V)


def core_matrix(T_A: Tensor, T_B: Tensor, weights: Tensor) -> Tensor:
    """The n×n core of B·diag(w)·A in the orthonormal bases of `triangular`."""
    return (T_B * weights.double()) @ T_A.T


class Spectrum(NamedTuple):
    """The SVD of a matrix (p, q) as U: (p, k), σ: (k,) descending and V: (q, k), 0 where σ is; or of many matrices."""

    U: Tensor
    S: Tensor
    V: Tensor


def small_svd(core: Tensor) -> Spectrum:
    """Of float64 cores (…, p, q), k = p."""
    U, S, projected = left_singular(core)
    return Spectrum(U, S, torch.where(S[..., None, :] > 0, projected.mT / S[..., None, :], 0.0))


def left_singular(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U: (…, p, p), σ: (…, p) descending and Uᵀ·core of float64 cores (…, p, q)."""
    # Eigenvectors of core·coreᵀ lose only what is below 1e-8 of the largest singular value, at half the cost of an SVD.
    U = torch.linalg.eigh(core @ core.mT).eigenvectors.flip(-1)
    projected = U.mT @ core
    return U, projected.norm(dim=-1), projected


def small_svd_of_rank(core: Tensor, rank: int) -> Spectrum:
    """As `small_svd` of cores whose ranks are at most `rank`, which may give fewer triplets than sides: none is lost.

    The products with a few random vectors more than the rank span all columns of a core.
    """
    count = rank + SPARE_VECTORS
    if 2 * count >= min(core.shape[-2:]):
        return small_svd(core)
    generator = torch.Generator().manual_seed(count)
    drawn = torch.randn(core.shape[-1], count, dtype=core.dtype, generator=generator).to(core.device)
    Q = torch.linalg.qr(core @ drawn).Q
    U, S, V = small_svd(Q.mT @ core)
    return Spectrum(Q @ U, S, V)


def triangular(X: Tensor, gram_X: Tensor) -> tuple[Tensor, Tensor]:
    """T and T⁺ (n×n, float64) with X = Q·T for an orthonormal Q: (d, n), so that Q = X·T⁺."""
    return gram_triangular(gram_X) or householder_triangular(X, gram_X)


def householder_triangular(X: Tensor, gram_X: Tensor) -> tuple[Tensor, Tensor]:
    """As `triangular`, of columns however nearly collinear."""
    scale = _column_scale(gram_X)
    R = torch.linalg.qr(X / scale.to(X.dtype), mode="r").R.double()
    # More columns than dimensions: zero rows keep every core n×n.
    R = torch.cat([R, R.new_zeros(R.shape[1] - R.shape[0], R.shape[1])])
    T = R * scale
    return T, _pseudo_inverse(R, X) / scale[:, None]


def gram_triangular(gram_X: Tensor) -> tuple[Tensor, Tensor] | None:
    """The T and T⁻¹ of `triangular` from the Gram matrix alone; None where that is not exact enough."""
    scale = _column_scale(gram_X)
    # Unit columns first: what remains of the condition number is collinearity, not a difference of sizes.
    L, failed = torch.linalg.cholesky_ex(gram_X / scale[:, None] / scale)
    if bool(failed):
        return None
    eye = torch.eye(len(L), dtype=L.dtype, device=L.device)
    inverse = torch.linalg.solve_triangular(L.T, eye, upper=True)
    if float(inverse.square().sum()) - len(L) > SAFE_INVERSE:
        return None
    return L.T * scale, inverse / scale[:, None]


def _column_scale(gram_X: Tensor) -> Tensor:
    norms = gram_X.diagonal().clamp_min(0).sqrt()
    return torch.where(norms > 0, norms, 1.0)


def _pseudo_inverse(R: Tensor, X: Tensor) -> Tensor:
    """R⁺ without the directions that are nothing but rounding of X's precision."""
    cutoff = max(X.shape) * torch.finfo(X.dtype).eps
    pseudo_inverse: Tensor = torch.linalg.pinv(R, rtol=cutoff)
    return pseudo_inverse


def truncated_factors(A: Tensor, B: Tensor, svd: CoreSvd, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-`rank` factors (rank, d_in) and (d_out, rank) of the sum, √σ on either side (Eckart-Young)."""
    right, left = svd.halves(rank)
    return right.to(A.dtype) @ A, B @ left.to(B.dtype)


def delta_products(gram_A: Tensor, gram_B: Tensor, owners: Tensor, adapters: int) -> Tensor:
    """(N, N) Frobenius inner products ⟨ΔWᵢ, ΔWⱼ⟩ of the adapters in a stack: block sums of G_A∘G_B.

    Args:
        owners: (n,) which adapter each component belongs to.
    """
    one_hot = torch.nn.functional.one_hot(owners, adapters).to(gram_A.dtype)
    return one_hot.T @ (gram_A * gram_B) @ one_hot


def product_norm(A: Tensor, B: Tensor) -> float:
    """‖B·A‖²_F of factors (k, d_in) and (d_out, k)."""
    return max(float((gram(A) * gram(B, columns=True)).sum()), 0.0)


def squared_norm(coordinates: Tensor, gram_A: Tensor, gram_B: Tensor) -> float:
    """‖B·K·A‖²_F for coordinates K: (n, n), as tr(Kᵀ·G_B·K·G_A)."""
    return max(float(((gram_B @ coordinates) * (coordinates @ gram_A)).sum()), 0.0)
