"""The nearest LoRA of a rank to a ΔW that is a product of factors, or a matrix; and how near it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from artifacts import low_rank_forms
from artifacts.algebra import core_svd, squared_norm, truncated_factors
from artifacts.errors import FieldError, FileBroken, MergeRefused
from artifacts.low_rank_forms import Pair
from merge.convertible import MAX_EXACT_RANK
from merge.gram import gram

ROUNDING = 1e-6
"""What a matrix of float32 numbers may lose, of its norm, and still be told to be exact."""
MAX_WHOLE_SIDE = 1280
"""Largest smaller side of a matrix whose spectrum is computed whole; above, a randomised SVD finds the large part."""
_OVERSAMPLED, _ITERATIONS = 8, 4


@dataclass(frozen=True, slots=True)
class ConvertedModule:
    """One module. `exact_rank` is the rank of its form (None: full); `relative_error` is ‖ΔW' − ΔW‖/‖ΔW‖."""

    path: str
    rank: int
    exact_rank: int | None
    relative_error: float


@dataclass(frozen=True, slots=True)
class Nearest:
    """(A, B), what is told of the module, and the squared norms of its error and of its ΔW."""

    pair: Pair
    told: ConvertedModule
    error: float
    energy: float


def of_factors(path: str, A: Tensor, B: Tensor, rank: int | None) -> Nearest:
    """The best LoRA of `rank` to B·A, or B·A itself.

    Raises:
        MergeRefused: no rank is given and the exact one is above `MAX_EXACT_RANK`; or ΔW is not finite.
        FileBroken: A and B have other ranks.
    """
    if A.shape[0] != B.shape[1]:
        raise FileBroken(f"{path}: its factors are of the ranks {A.shape[0]} and {B.shape[1]}.")
    if A.shape[0] > min(A.shape[1], B.shape[0]):  # then the matrix itself is smaller than its factors
        A, B = low_rank_forms.factored(B @ A, None, None)
    exact = A.shape[0]
    if exact == 0:
        return _nothing(path, B.shape[0], A.shape[1])
    gram_A, gram_B = gram(A), gram(B, columns=True)
    ones = torch.ones(exact, dtype=torch.float64)
    energy = squared_norm(torch.diag(ones), gram_A, gram_B)
    if not math.isfinite(energy):
        raise _infinite(path)
    wanted = exact if rank is None else min(rank, exact)
    if rank is None and exact > MAX_EXACT_RANK:
        raise _too_large(path, exact)
    if wanted == exact:
        return Nearest((A, B), ConvertedModule(path, exact, exact, 0.0), 0.0, energy)
    svd = core_svd(A, B, ones, gram_A, gram_B)
    error = float(svd.values[wanted:].square().sum())
    pair = truncated_factors(A, B, svd, wanted)
    return Nearest(pair, ConvertedModule(path, wanted, exact, relative(error, energy)), error, energy)


def of_matrix(path: str, delta: Tensor, rank: int | None, default: int | None = None) -> Nearest:
    """The best LoRA of `rank` to the matrix ΔW: (d_out, d_in); one of its numerical rank where that is smaller.

    Up to `MAX_WHOLE_SIDE` the best there is (Eckart-Young), by the eigenvectors of a float64 Gram matrix; of larger
    matrices the leading part is found by a randomised SVD with a fixed seed (arXiv:0909.4061, algorithm 4.4).

    Args:
        default: rank where none is given; None: the numerical one.

    Raises:
        MergeRefused: ΔW is not finite; or the numerical rank counts, and it is above `MAX_EXACT_RANK`.
    """
    energy = float(delta.double().square().sum())
    if not math.isfinite(energy):
        raise _infinite(path)
    if energy == 0:
        return _nothing(path, *delta.shape)
    asked = rank or default
    limit = min(delta.shape)
    U, S = _leading(delta, limit if limit <= MAX_WHOLE_SIDE else min((asked or MAX_EXACT_RANK) + _OVERSAMPLED, limit))
    left = (energy - S.square().cumsum(0)).clamp_min(0)
    enough = (left <= ROUNDING**2 * energy).nonzero()
    numerical = int(enough[0]) + 1 if len(enough) else limit
    if asked is None and numerical > MAX_EXACT_RANK:
        raise _too_large(path, numerical)
    wanted = min(asked or numerical, numerical, len(S))
    root = S[:wanted].sqrt()
    across, along = (U[:, :wanted] * root).float(), (U[:, :wanted] / root).float()
    wide = delta.shape[0] <= delta.shape[1]
    pair = (along.T @ delta, across) if wide else (across.T.contiguous(), delta @ along)
    error = float((delta - pair[1] @ pair[0]).double().square().sum())
    known = numerical if wanted == numerical or numerical < limit else None
    return Nearest(pair, ConvertedModule(path, wanted, known, relative(error, energy)), error, energy)


def _leading(delta: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Singular vectors (smaller side, count) on the smaller side, and values (count,), float64, largest first."""
    short = delta if delta.shape[0] <= delta.shape[1] else delta.T
    if short.shape[0] <= MAX_WHOLE_SIDE:
        values, U = torch.linalg.eigh(gram(short.double()))
        return U.flip(1), values.flip(0).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found, _, _ = torch.svd_lowrank(short, q=count, niter=_ITERATIONS)
    # In float64 from here on: what is left of the energy tells the numerical rank.
    Q = torch.linalg.qr(found.double()).Q
    values, turned = torch.linalg.eigh(gram(Q.T @ short.double()))
    return (Q @ turned).flip(1), values.flip(0).clamp_min(torch.finfo(torch.float64).tiny).sqrt()


def _nothing(path: str, d_out: int, d_in: int) -> Nearest:
    return Nearest((torch.zeros(1, d_in), torch.zeros(d_out, 1)), ConvertedModule(path, 1, 1, 0.0), 0.0, 0.0)


def _infinite(path: str) -> MergeRefused:
    return MergeRefused(f"What is added to {path} is not finite.")


def _too_large(path: str, rank: int) -> MergeRefused:
    return MergeRefused(
        f"{path} is a LoRA of rank {rank} exactly, which is above {MAX_EXACT_RANK}.",
        hint="Ask for a rank: the nearest LoRA of that rank is made, and its error told.",
        errors=[FieldError("/rank", f"the exact rank of {path} is {rank}")],
    )


def relative(error: float, energy: float) -> float:
    """‖error‖/‖ΔW‖ from their squares, to six digits."""
    return float(f"{math.sqrt(max(error, 0.0) / energy):.6g}") if energy > 0 else 0.0
