"""Entrywise rules: how N blocks of equal shape become one. Of whole matrices, core matrices, factors or rows alike.

Blocks are X: (N, rows, columns), weights (N,). Order of the blocks changes nothing but rounding. Blocks of float32 on a
CPU, which is what large matrices come in, take the compiled loops of `merge.entry_loops`; others are tensor algebra.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge import entry_loops, mask_loops

if TYPE_CHECKING:
    from merge.stack import Stack

Election = Literal["total", "frequency"]

SAMPLED_COLUMNS = 8


class Window(NamedTuple):
    """Which entries of each block take part: those with lower ≤ |x| < upper, both (N,)."""

    lower: Tensor
    upper: Tensor

    def of(self, X: Tensor) -> Tensor:
        """X with the others zero."""
        size = X.abs()
        return X * ((size >= _broadcast(self.lower, X)) & (size < _broadcast(self.upper, X)))


def weighted_sum(X: Tensor, weights: Tensor, window: Window | None = None) -> Tensor:
    """Σ wᵢXᵢ."""
    if compiled(X):
        result = X.new_empty(X.shape[1:])
        entry_loops.weighted_sum(_flat(X), *borders(len(X), X, window), floats(weights, X), result.view(-1).numpy())
        return result
    total: Tensor = torch.tensordot(weights.to(X.dtype), window.of(X) if window else X, dims=1)
    return total


def elected_sum(X: Tensor, weights: Tensor, election: Election, window: Window | None = None) -> Tensor:
    """Sum of the weighted entries that have the elected sign, divided by how many do (arXiv:2306.01708, PEFT's order).

    The sign is elected on the entries without their weights: that of their sum (total) or of most of them (frequency);
    0 elects plus. Zeros never agree.
    """
    ones = torch.ones_like(weights)
    return elected(X, ones, weights, ones, election, window)


def elected_mean(
    X: Tensor, weights: Tensor, election: Election, *, normalize: bool, window: Window | None = None
) -> Tensor:
    """As mergekit: the sign is elected on the weighted entries, and the divisor is the weight of those that agree."""
    return elected(X, weights, weights, weights if normalize else torch.zeros_like(weights), election, window)


def elected(
    X: Tensor, votes: Tensor, weights: Tensor, shares: Tensor, election: Election, window: Window | None = None
) -> Tensor:
    """Σ weightsᵢXᵢ over the entries of the elected sign, divided by Σ sharesᵢ over them (by 1 where that is 0).

    The sign is that of Σ votesᵢXᵢ (total), or the one that more of the votesᵢXᵢ have (frequency); 0 elects plus.
    """
    if compiled(X):
        result = X.new_empty(X.shape[1:])
        columns = (floats(values, X) for values in (votes, weights, shares))
        entry_loops.elected(
            _flat(X), *borders(len(X), X, window), *columns, election == "frequency", result.view(-1).numpy()
        )
        return result
    X = window.of(X) if window else X
    voted = X * _broadcast(votes, X)
    majority = _majority(voted if election == "total" else voted.sign())
    agrees = (voted * majority > 0).to(X.dtype)
    divisor = weighted_sum(agrees, shares)
    return weighted_sum(X * agrees, weights) / torch.where(divisor == 0, 1.0, divisor)


def compiled(X: Tensor) -> bool:
    """Whether the compiled loops take a tensor like this."""
    return X.dtype == torch.float32 and X.device.type == "cpu" and X.is_contiguous()


def _flat(X: Tensor) -> NDArray[np.float32]:
    return X.view(len(X), -1).numpy()


def floats(values: Tensor, X: Tensor) -> NDArray[np.float32]:
    """As a compiled loop on X takes numbers of the blocks."""
    return values.to(X.dtype).numpy()


def borders(count: int, X: Tensor, window: Window | None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The borders of as many blocks as a compiled loop on X takes them."""
    if window:
        return floats(window.lower, X), floats(window.upper, X)
    return np.zeros(count, np.float32), np.full(count, np.inf, np.float32)


def _majority(votes: Tensor) -> Tensor:
    return torch.where(votes.sum(0) >= 0, 1.0, -1.0).to(votes.dtype)


def _broadcast(values: Tensor, X: Tensor) -> Tensor:
    return values.to(X.dtype).view(-1, *(1,) * (X.dim() - 1))


def kept_count(density: float, entries: int) -> int:
    """How many entries a density keeps: rounded down, as PEFT and mergekit do."""
    return int(density * entries)


def trimmed(X: Tensor, density: float) -> Tensor:
    """One block (rows, columns) with its largest |entries| kept, a `density` of all. Ties at the border all stay.

    (PEFT keeps an arbitrary choice among ties; keeping all makes the result a function of the values alone.)
    """
    kept = kept_count(density, X.numel())
    if kept >= X.numel():
        return X
    if kept == 0:
        return torch.zeros_like(X)
    return above(X, kth_largest(X.abs().flatten(), kept))


def trimming(X: Iterable[Tensor], density: float, entries: int) -> Window | None:
    """The window in which `trimmed` keeps each block (rows, columns) of X; None when it keeps all `entries` of one."""
    kept = kept_count(density, entries)
    if kept >= entries:
        return None
    lower = torch.stack([x.new_tensor(kth_largest(x.abs().flatten(), kept)) for x in X])
    return Window(lower, torch.full_like(lower, math.inf))


def kth_largest(values: Tensor, k: int) -> float:
    """Of (m,) values, 1 ≤ k ≤ m; ∞ for k = 0. May leave them in another order."""
    if k == 0:
        return math.inf
    place = len(values) - k
    if values.device.type == "cpu":  # numpy selects many times faster than torch
        numbers = values.numpy()
        numbers.partition(place)
        return float(numbers[place])
    return float(values.kthvalue(place + 1).values)


def above(X: Tensor, border: float) -> Tensor:
    """X where |X| ≥ border, else 0."""
    if border <= 0:
        return X
    # hardshrink is one pass, where a product with a mask is three; it keeps what lies strictly above
    below = torch.nextafter(torch.tensor(border, dtype=X.dtype), torch.tensor(0.0, dtype=X.dtype))
    return torch.nn.functional.hardshrink(X, float(below))


def dropped(X: Tensor, density: float, seed: int) -> Tensor:
    """One block (rows, columns), each entry kept with probability `density` and divided by it (arXiv:2311.03099)."""
    if density >= 1:
        return X
    return erased(X[None].clone(), np.array([seed], np.uint64), 0, 0, density)[0] / density


def dropped_by(X: Tensor, keys: NDArray[np.uint64], first_row: int, probabilities: Tensor, *, rescale: bool) -> Tensor:
    """Whole rows X (N, rows, d_in), each entry kept whose uniform number is below its probability. May be X, changed.

    Args:
        rescale: divide what is kept by its probability.
    """
    if compiled(X):
        mask_loops.drop(X.numpy(), keys, first_row, probabilities.numpy(), rescale)
        return X
    uniform = (_drawn(keys, first_row, 0, X) >> 8).to(torch.float32) * 2.0**-24
    kept = X * (uniform < probabilities)
    return kept / probabilities if rescale else kept


def erased(X: Tensor, keys: NDArray[np.uint64], first_row: int, first_column: int, density: float) -> Tensor:
    """X (N, rows, columns) with each entry kept with probability `density`, 0 < density < 1. May be X, changed.

    Whether an entry stays depends on the key and on its row and column in the matrix, not on how that is cut.
    """
    last = last_kept(density)
    if compiled(X):
        mask_loops.erase(X.numpy(), keys, first_row, first_column, last)
        return X
    return X * (_drawn(keys, first_row, first_column, X) <= int(last))


def last_kept(density: float) -> np.uint32:
    """The largest of the random numbers whose entries stay, 0 < density < 1."""
    return np.uint32(min(math.ceil(density * 2**32), 2**32) - 1)


def _drawn(keys: NDArray[np.uint64], row: int, column: int, X: Tensor) -> Tensor:
    """The random integers from 0 to 2³² − 1 of the entries of X (N, rows, columns)."""
    drawn = np.empty(X.shape, np.uint32)
    mask_loops.draw(keys, row, column, drawn)
    return torch.from_numpy(drawn.astype(np.int64)).to(X.device)


def variance(X: Tensor, sizes: Tensor) -> Tensor:
    """Of sizesᵢXᵢ over the blocks, (…) of X: (N, …); 0 where it is no more than the rounding of the mean."""
    if compiled(X):
        result = X.new_empty(X.shape[1:])
        entry_loops.variance(_flat(X), floats(sizes, X), result.view(-1).numpy())
        return result
    scaled = X * _broadcast(sizes, X)
    found = (scaled - scaled.mean(0)).square_().mean(0)
    rounding = len(X) * torch.finfo(X.dtype).eps * scaled.abs().amax(0)
    return torch.where(found < rounding.square(), 0.0, found)


def energies(X: Tensor, chosen: Tensor) -> Tensor:
    """(N,) float64 Σ Xᵢ² of X: (N, rows, columns) over the chosen places (rows, columns)."""
    return (X * chosen).square().flatten(1).sum(1).double()


def keys(stack: Stack, seed: int) -> NDArray[np.uint64]:
    """(N,): as `seeds`."""
    return np.array(seeds(stack, seed), np.uint64)


def seeds(stack: Stack, seed: int) -> Sequence[int]:
    """64 bits for each owner, in the order of `Stack.members`, from `seed` and the owner's numbers in this module.

    So masks differ between adapters and between modules, and do not depend on the order of a request.
    """
    columns = torch.linspace(0, stack.A.shape[1] - 1, SAMPLED_COLUMNS).long().to(stack.A.device)
    rows = torch.linspace(0, stack.B.shape[0] - 1, SAMPLED_COLUMNS).long().to(stack.B.device)
    found: list[int] = []
    for _, own in stack.members:
        digest = hashlib.sha256(seed.to_bytes(8, "big"))
        digest.update(stack.A[own][:, columns].cpu().numpy().tobytes())
        digest.update(stack.B[rows][:, own].cpu().numpy().tobytes())
        value = int.from_bytes(digest.digest()[:8], "big")
        # equal copies must not be masked alike
        while value in found:
            value = (value + 1) % 2**64
        found.append(value)
    return found
