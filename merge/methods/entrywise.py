"""Methods that look at the entries of the deltas themselves: trimming, dropping, electing signs on ΔWᵢ.

They run on tiles of a few dense rows. The result has full rank in general, and is truncated to the output rank by a
streaming SVD; the report's truncation_error is what that costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge import rank_loops, rules, strips
from merge.brackets import Tally
from merge.entry_rule import EntryRule
from merge.entrywise_options import (
    BreadcrumbsOptions,
    BreadcrumbsTiesOptions,
    DareSvdOptions,
    DareTiesSvdOptions,
    DellaLinearOptions,
    DellaOptions,
    EntrywiseOptions,
    PruneSvdOptions,
    SceOptions,
    TiesMergekitOptions,
    TiesSvdOptions,
)
from merge.result import MergedModule
from merge.row_svd import directions, row_svd
from merge.rows import DeltaRows, Variance, entries, largest, trimming
from merge.stack import Stack
from merge.strips import BLOCK_ROWS

MOST_PLACE_BITS = 20
"""Of a short key; the others tell sizes apart."""

Drop = Callable[[int, Tensor], Tensor]
"""First row and whole rows of the deltas (N, rows, d_in), which may be changed → what is left of them."""


def ties_svd(stack: Stack, options: TiesSvdOptions, rank: int) -> MergedModule:
    """`ties_svd` of PEFT (arXiv:2306.01708)."""
    deltas = DeltaRows.of(stack)
    window = trimming(deltas, options.density)
    rule = EntryRule.elected_sum(stack.owner_weights, options.majority_sign_method, window)
    return _merged(stack, deltas, rule, options, rank)


def ties_mergekit(stack: Stack, options: TiesMergekitOptions, rank: int) -> MergedModule:
    """`ties` of mergekit (arXiv:2306.01708): weights take part in the vote and in the divisor."""
    deltas = DeltaRows.of(stack)
    return _merged(stack, deltas, _electing(stack, options, trimming(deltas, options.density)), options, rank)


def magnitude_prune_svd(stack: Stack, options: PruneSvdOptions, rank: int) -> MergedModule:
    """`magnitude_prune_svd` of PEFT."""
    deltas = DeltaRows.of(stack)
    rule = EntryRule.sum(stack.owner_weights, trimming(deltas, options.density))
    return _merged(stack, deltas, rule, options, rank)


def dare_linear_svd(stack: Stack, options: DareSvdOptions, rank: int) -> MergedModule:
    """`dare_linear_svd` of PEFT (arXiv:2311.03099)."""
    rule = EntryRule.sum(stack.owner_weights / options.density)
    return _merged(stack, DeltaRows.of(stack), _dropping(rule, stack, options), options, rank)


def dare_ties_svd(stack: Stack, options: DareTiesSvdOptions, rank: int) -> MergedModule:
    """`dare_ties_svd` of PEFT (arXiv:2311.03099)."""
    rule = EntryRule.elected_sum(stack.owner_weights / options.density, options.majority_sign_method)
    return _merged(stack, DeltaRows.of(stack), _dropping(rule, stack, options), options, rank)


def della(stack: Stack, options: DellaOptions, rank: int) -> MergedModule:
    """DELLA (arXiv:2406.11617): entries are dropped by their rank in the row, then signs are elected as in mergekit."""
    drop, rule = _dropping_by_rank(stack, options), _electing(stack, options, None)
    return _merged(stack, DeltaRows.of(stack), rule, options, rank, drop)


def della_linear(stack: Stack, options: DellaLinearOptions, rank: int) -> MergedModule:
    """DELLA without the election (arXiv:2406.11617)."""
    drop, rule = _dropping_by_rank(stack, options), EntryRule.sum(stack.owner_weights)
    return _merged(stack, DeltaRows.of(stack), rule, options, rank, drop)


def breadcrumbs(stack: Stack, options: BreadcrumbsOptions, rank: int) -> MergedModule:
    """Model Breadcrumbs (arXiv:2312.06795): neither the largest entries nor the smallest."""
    deltas = DeltaRows.of(stack)
    return _merged(stack, deltas, EntryRule.sum(stack.owner_weights, _middle(deltas, options)), options, rank)


def breadcrumbs_ties(stack: Stack, options: BreadcrumbsTiesOptions, rank: int) -> MergedModule:
    """Model Breadcrumbs (arXiv:2312.06795), then signs are elected as in mergekit."""
    deltas = DeltaRows.of(stack)
    return _merged(stack, deltas, _electing(stack, options, _middle(deltas, options)), options, rank)


def sce(stack: Stack, options: SceOptions, rank: int) -> MergedModule:
    """SCE (arXiv:2408.07990): the positions where the deltas vary most, weights by energy, minority signs erased."""
    deltas = DeltaRows.of(stack)
    sizes = stack.owner_weights
    tally = Tally.of(len(deltas.A), deltas.entries // 32)
    border = _variance_border(deltas, Variance(sizes, tally), options.density)
    energies = stack.products.diagonal() if border == 0 else deltas.energies(sizes, border, tally)
    energies = energies * sizes.square()
    total = energies.sum()
    shares = energies / total if float(total) > 0 else torch.full_like(energies, 1 / len(energies))
    # the vote is without the weights by energy, the mean with them
    rule = EntryRule(sizes * shares, sizes, shares, "total", sizes=sizes, least=border)
    return _merged(stack, deltas, rule, options, rank)


def _electing(
    stack: Stack,
    options: TiesMergekitOptions | DellaOptions | BreadcrumbsTiesOptions,
    window: rules.Window | None,
) -> EntryRule:
    """mergekit's election among the entries of a window."""
    election, normalize = options.majority_sign_method, options.normalize
    return EntryRule.elected_mean(stack.owner_weights, election, normalize=normalize, window=window)


def _middle(deltas: DeltaRows, options: BreadcrumbsOptions) -> rules.Window | None:
    """`density` of each delta's entries below its largest `gamma`; those at either border all stay."""
    if options.density >= 1:
        return None
    kept = rules.kept_count(options.density, deltas.entries)
    # what is to be kept comes first: then fewer of the largest go
    dropped = min(rules.kept_count(options.gamma, deltas.entries), deltas.entries - kept)
    if kept == 0:
        nothing = deltas.A[0].new_full((len(deltas.A),), math.inf)
        return rules.Window(nothing, nothing)
    # of all entries the last one is no border
    first = min(dropped + 1, deltas.entries - 1)
    found = largest(deltas, entries, [[first, dropped + kept]] * len(deltas.A))
    upper = _per_delta(deltas, found, 0)
    return rules.Window(_per_delta(deltas, found, 1), upper.nextafter(torch.full_like(upper, math.inf)))


def _per_delta(deltas: DeltaRows, found: list[list[float]], number: int) -> Tensor:
    """(N,)."""
    return torch.tensor([values[number] for values in found], dtype=torch.float64).to(deltas.A[0])


def _dropping(rule: EntryRule, stack: Stack, options: DareSvdOptions) -> EntryRule:
    """The rule of what DARE keeps, which is yet to be divided by the density."""
    return rule.dropping(rules.keys(stack, options.seed), options.density)


def _dropping_by_rank(stack: Stack, options: DellaLinearOptions) -> Drop:
    """Per row, the keep probability rises with the rank of the |entry| from density − ε to density + ε."""
    keys = rules.keys(stack, options.seed)

    def drop(row: int, X: Tensor) -> Tensor:
        if options.density >= 1:
            return X
        probabilities = keep_probabilities(X, options.density, options.epsilon)
        return rules.dropped_by(X, keys, row, probabilities, rescale=options.rescale)

    return drop


def keep_probabilities(X: Tensor, density: float, epsilon: float) -> Tensor:
    """Of entries (…, rows, columns), linear in the rank of |entry| in its row; of equal ones, by place."""
    columns = X.shape[-1]
    if columns == 1:
        return torch.full_like(X, density)
    ranks = torch.arange(columns, dtype=X.dtype, device=X.device) / (columns - 1)
    ramp = density - epsilon + 2 * epsilon * ranks
    if rules.compiled(X):
        return _by_sorted_keys(X, ramp.numpy())
    return torch.empty_like(X).scatter_(-1, X.abs().argsort(dim=-1, stable=True), ramp.expand_as(X))


def _by_sorted_keys(X: Tensor, ramp: NDArray[np.float32]) -> Tensor:
    """numpy sorts integers many times faster than torch finds a stable order, and short ones twice as fast as long."""
    result = torch.empty_like(X)
    rows, probabilities = X.view(-1, len(ramp)).numpy(), result.view(-1, len(ramp)).numpy()
    place_bits = (len(ramp) - 1).bit_length()
    done = np.zeros(len(rows), np.bool_)
    if place_bits <= MOST_PLACE_BITS:
        keys = np.empty(rows.shape, np.uint32)
        rank_loops.short_keys(rows, place_bits, keys)
        keys.sort(axis=-1)
        rank_loops.by_short_keys(rows, place_bits, keys, ramp, probabilities, done)
    for row in np.flatnonzero(~done):
        exact = np.empty(len(ramp), np.int64)
        rank_loops.long_keys(rows[row], exact)
        exact.sort()
        probabilities[row, exact & 0xFFFFFFFF] = ramp
    return result


def _variance_border(deltas: DeltaRows, variance: Variance, density: float) -> float:
    """The least variance between the deltas that a selected position has; 0 when all are selected."""
    if density >= 1 or len(deltas.A) == 1:
        return 0.0
    rows = torch.stack([B.abs().amax(1) for B in deltas.B]).amax(0).count_nonzero()
    columns = torch.stack([A.abs().amax(0) for A in deltas.A]).amax(0).count_nonzero()
    kept = rules.kept_count(density, int(rows) * int(columns))
    return largest(deltas, variance, [[kept]])[0][0]


def _merged(
    stack: Stack,
    deltas: DeltaRows,
    rule: EntryRule,
    options: EntrywiseOptions,
    rank: int,
    drop: Drop | None = None,
) -> MergedModule:
    """The merged rows at min(rank, d_out, d_in) components. `drop` changes whole rows before the rule sees them."""

    def fill(first_row: int, block: Tensor) -> None:
        if block.dim() == 3 and drop is None and deltas.compiled:
            deltas.merged(rule, first_row, block)
            return
        rows = range(first_row, min(first_row + BLOCK_ROWS, deltas.shape[0]))
        merged = block if block.dim() == 2 else block.new_empty(len(rows), deltas.shape[1])
        for row, column, tile in deltas.tiles(rows, whole_rows=drop is not None):
            X = drop(row, tile) if drop else tile
            here = merged[row - first_row : row - first_row + tile.shape[1], column : column + tile.shape[2]]
            here.copy_(rule(row, column, X))
        if block.dim() == 3:
            strips.write(block, merged)

    # the exact sum's own directions are the best guess of those of the result
    right = stack.svd().right[:, : directions(rank)].to(stack.A.dtype)
    low = row_svd(fill, deltas.shape, rank, stack.A.T @ right, options.passes)
    figures: Mapping[str, float] = {"truncation_error": low.truncation_error}
    return MergedModule(low.A * options.scale, low.B, stack, None, figures=figures)
