"""Which format each matrix gets: the integer program of arXiv:2311.12023, section 3.2, by HiGHS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SECONDS = 60.0
GAP = 1e-4
_WHOLE = 1e-6


class BudgetTooSmallError(ValueError):
    """No choice fits. `least` is the smallest budget that one does, in the unit of the given one."""

    def __init__(self, least: float) -> None:
        super().__init__(f"the smallest budget is {least:.6g}")
        self.least = least


@dataclass(frozen=True, slots=True)
class Allocation:
    """One option for each matrix.

    Attributes:
        choice: number of the option.
        cost: sum of the costs.
        size: sum of the sizes.
        gap: how far the cost may be above the least one, as a share; more than `GAP` when the time ran out.
    """

    choice: tuple[int, ...]
    cost: float
    size: int
    gap: float


def allocate(costs: NDArray[np.float64], sizes: NDArray[np.int64], budget: int) -> Allocation:
    """minimise Σ costs of the choices, with one choice for each matrix and Σ sizes ≤ budget.

    Args:
        costs: (matrices, options), not negative; infinite where a matrix can not have the option.
        sizes: (matrices, options), whole numbers, compared with the budget exactly.

    Raises:
        BudgetTooSmallError: not even the smallest options fit.
        ValueError: a matrix without an option, or no solution within the time.
    """
    kept = [_undominated(costs[row], sizes[row]) for row in range(len(costs))]
    if not all(kept):
        raise ValueError(f"matrix {next(row for row, options in enumerate(kept) if not options)} has no option")
    least = sum(int(min(sizes[row, options])) for row, options in enumerate(kept))
    if least > budget:
        raise BudgetTooSmallError(least)
    places = [(row, option) for row, options in enumerate(kept) for option in options]
    chosen, gap = _solve(
        np.array([costs[place] for place in places]), np.array([sizes[place] for place in places]), places, budget
    )
    choice = [option for _, option in sorted(chosen)]
    if [row for row, _ in sorted(chosen)] != list(range(len(costs))):
        raise ValueError("the solver did not choose one option for each matrix")
    size = sum(int(sizes[row, option]) for row, option in enumerate(choice))
    if size > budget:
        raise ValueError(f"the solver's choice is {size - budget} above the budget")
    return Allocation(tuple(choice), float(sum(costs[row, option] for row, option in enumerate(choice))), size, gap)


def _undominated(costs: NDArray[np.float64], sizes: NDArray[np.int64]) -> list[int]:
    """The options of a matrix that are better than every one that is no larger: the others are never needed."""
    found: list[int] = []
    best = np.inf
    for option in sorted(range(len(costs)), key=lambda option: (sizes[option], costs[option], option)):
        if costs[option] < best:
            found.append(option)
            best = costs[option]
    return found


def _solve(
    costs: NDArray[np.float64], sizes: NDArray[np.int64], places: Sequence[tuple[int, int]], budget: int
) -> tuple[list[tuple[int, int]], float]:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array, csr_array, vstack

    rows = np.array([row for row, _ in places])
    columns = np.arange(len(places))
    once = coo_array((np.ones(len(places)), (rows, columns)), shape=(int(rows.max()) + 1, len(places)))
    scale = max(float(budget), 1.0)
    matrix = vstack([csr_array((sizes / scale)[None, :]), once]).tocsc()
    upper = np.ones(once.shape[0] + 1)
    lower = np.concatenate([[-np.inf], np.ones(once.shape[0])])
    norm = float(np.linalg.norm(costs))
    answer = milp(
        costs * (1000 / norm) if norm > 0 else costs,
        integrality=np.ones(len(places)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, lower, upper),
        options={"time_limit": SECONDS, "mip_rel_gap": GAP},
    )
    if answer.x is None:
        raise ValueError(f"no allocation was found: {answer.message}")
    if float(np.abs(answer.x - answer.x.round()).max()) > _WHOLE:
        raise ValueError("the solver's answer is not whole")
    chosen = [place for place, taken in zip(places, answer.x.round(), strict=True) if taken == 1]
    return chosen, float(answer.mip_gap or 0.0)
