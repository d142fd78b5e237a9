"""The format of each matrix under a budget: every format is tried on every matrix, then an integer program chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from artifacts.errors import FieldError, RequestInvalid
from train.options.quantisation import QuantisationOptions
from train.quantised.allocation import BudgetTooSmallError, allocate
from train.quantised.block_format import BlockFormat
from train.quantised.decomposition import decompose
from train.quantised.fisher_weights import Heuristic, RowColumnWeights
from train.quantised.low_rank import LowRankFactors

if TYPE_CHECKING:
    from numpy.typing import NDArray

POINTER = "/parameters/budget_bits"


@dataclass(frozen=True, slots=True)
class FormatChoice:
    """What the budget bought.

    Attributes:
        formats: path → format.
        cost: Σ ‖√F ∘ (W − Q − L1·L2)‖² of the choice, as the trials measured it.
        uniform_cost: the same of the best single format that fits all matrices and the budget; None if there is none.
        gap: of the integer program: how far above the least cost it may be, as a share.
    """

    formats: Mapping[str, BlockFormat]
    cost: float
    uniform_cost: float | None
    gap: float


@dataclass(frozen=True, slots=True)
class Subject:
    """One matrix. `number`: its place among all. `fisher`: F, not all 0; None counts its entries alike."""

    path: str
    number: int
    weight: Tensor
    fisher: Tensor | None = None
    heuristic: Heuristic = "two-sided"


def low_rank_factors(options: QuantisationOptions, subject: Subject) -> LowRankFactors:
    """With random numbers of the matrix's own, so that the order of the work makes no difference."""
    generator = torch.Generator().manual_seed((options.seed << 20) + subject.number)
    weights = None if subject.fisher is None else RowColumnWeights.of(subject.fisher, subject.heuristic)
    return LowRankFactors(options.rank, oversampling=options.oversampling, generator=generator, weights=weights)


def choose_formats(
    sides: Mapping[str, tuple[int, int]],
    options: QuantisationOptions,
    read: Callable[[str], Subject],
    progress: Callable[[float, str], None],
) -> FormatChoice:
    """A format for each matrix.

    Args:
        sides: path → (d_out, d_in).
        read: gives the matrix at a path.
        progress: called with the fraction done and a message; may raise to stop.

    Raises:
        RequestInvalid: no choice fits the budget; the smallest budget that one does is told.
    """
    formats = options.formats
    numels = [d_out * d_in for d_out, d_in in sides.values()]
    sizes = np.array([[form.bits_of(numel) for form in formats] for numel in numels], dtype=np.int64)
    allowed = np.array([[form.fits(numel) for form in formats] for numel in numels])
    assert options.budget_bits is not None
    budget = int(options.budget_bits * sum(numels))
    _check_budget(sizes, allowed, budget, sum(numels))
    costs = np.full(sizes.shape, np.inf)
    for row, path in enumerate(sides):
        subject = read(path)
        start = low_rank_factors(options, subject)
        first = start(subject.weight)
        for column in np.flatnonzero(allowed[row]):
            done = row + column / len(formats)
            progress(done / len(sides), f"trying {len(formats)} formats on {path}, {row + 1} of {len(sides)}")
            costs[row, column] = _cost(subject, formats[column], options, copy(start), first)
    try:
        found = allocate(costs, sizes, budget)
    except BudgetTooSmallError as error:
        raise _too_small(error.least / sum(numels)) from error
    chosen = {path: formats[option] for path, option in zip(sides, found.choice, strict=True)}
    return FormatChoice(chosen, found.cost, _best_uniform(costs, sizes, budget), found.gap)


def check_formats(sides: Mapping[str, tuple[int, int]], formats: Sequence[BlockFormat]) -> None:
    """Raises RequestInvalid for the matrices that have no format whose blocks are whole."""
    odd = [path for path, (d_out, d_in) in sides.items() if not any(form.fits(d_out * d_in) for form in formats)]
    if not odd:
        return
    first = f"{odd[0]} has {sides[odd[0]][0]}×{sides[odd[0]][1]} weights, which no format divides into whole blocks"
    raise RequestInvalid(
        f"{first}.",
        hint="Leave it out of target_modules, or allow smaller blocks (parameters.grid, with budget_bits).",
        errors=[FieldError("/parameters/target_modules", f"{path} fits no format") for path in odd[:20]],
    )


def _cost(
    subject: Subject,
    form: BlockFormat,
    options: QuantisationOptions,
    factors: LowRankFactors,
    first: tuple[Tensor, Tensor],
) -> float:
    """‖√F ∘ (W − Q − L1·L2)‖² of the whole decomposition in this format; infinite if the format can not hold it.

    `factors` have already found `first`, those of W.
    """
    try:
        found = decompose(
            subject.weight,
            form,
            factors,
            iterations=options.cost_iterations,
            rtol=options.cost_rtol,
            fisher=subject.fisher,
            first=first,
        )
    except ValueError:
        return float("inf")
    return found.error**2


def _check_budget(sizes: NDArray[np.int64], allowed: NDArray[np.bool_], budget: int, numel: int) -> None:
    least = int(np.where(allowed, sizes, np.iinfo(np.int64).max).min(axis=1).sum())
    if least > budget:
        raise _too_small(least / numel)


def _too_small(least: float) -> RequestInvalid:
    problem = f"the smallest budget that these formats allow is {least:.4f} bits per weight"
    return RequestInvalid(
        f"The budget can not be kept: {problem}.",
        hint="Raise budget_bits, or allow fewer bits in parameters.grid.",
        errors=[FieldError(POINTER, problem)],
    )


def _best_uniform(costs: NDArray[np.float64], sizes: NDArray[np.int64], budget: int) -> float | None:
    found = costs.sum(axis=0)[sizes.sum(axis=0) <= budget]
    return float(found.min()) if len(found) and np.isfinite(found.min()) else None
