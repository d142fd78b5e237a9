"""Methods that look at the entries of the deltas themselves: trimming, dropping, electing signs on ΔWᵢ.

They run on a few dense rows at a time. The result has full rank in general, and is truncated to the output rank by a
streaming SVD; the report's truncation_error is what that costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from artifacts.algebra import core_svd
from merge import rules
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
from merge.row_svd import row_svd
from merge.rows import DeltaRows, largest
from merge.stack import Stack

Combine = Callable[[int, Tensor], Tensor]
"""First row and dense rows of the deltas (N, rows, d_in) → rows of the result (rows, d_in)."""


def ties_svd(stack: Stack, options: TiesSvdOptions, rank: int) -> MergedModule:
    """`ties_svd` of PEFT (arXiv:2306.01708)."""
    deltas, weights = DeltaRows.of(stack), stack.owner_weights
    trim = _trimming(deltas, options.density)
    election = options.majority_sign_method
    return _merged(stack, deltas, lambda _, X: rules.elected_sum(trim(X), weights, election), options, rank)


def ties_mergekit(stack: Stack, options: TiesMergekitOptions, rank: int) -> MergedModule:
    """`ties` of mergekit (arXiv:2306.01708): weights take part in the vote and in the divisor."""
    deltas, weights = DeltaRows.of(stack), stack.owner_weights
    trim = _trimming(deltas, options.density)
    return _merged(stack, deltas, lambda _, X: _elected_mean(trim(X), weights, options), options, rank)


def magnitude_prune_svd(stack: Stack, options: PruneSvdOptions, rank: int) -> MergedModule:
    """`magnitude_prune_svd` of PEFT."""
    deltas, weights = DeltaRows.of(stack), stack.owner_weights
    trim = _trimming(deltas, options.density)
    return _merged(stack, deltas, lambda _, X: rules.weighted_sum(trim(X), weights), options, rank)


def dare_linear_svd(stack: Stack, options: DareSvdOptions, rank: int) -> MergedModule:
    """`dare_linear_svd` of PEFT (arXiv:2311.03099)."""
    weights, drop = stack.owner_weights, _dropping(stack, options)
    return _merged(stack, DeltaRows.of(stack), lambda r, X: rules.weighted_sum(drop(r, X), weights), options, rank)


def dare_ties_svd(stack: Stack, options: DareTiesSvdOptions, rank: int) -> MergedModule:
    """`dare_ties_svd` of PEFT (arXiv:2311.03099)."""
    weights, drop = stack.owner_weights, _dropping(stack, options)
    election = options.majority_sign_method
    return _merged(
        stack, DeltaRows.of(stack), lambda r, X: rules.elected_sum(drop(r, X), weights, election), options, rank
    )


def della(stack: Stack, options: DellaOptions, rank: int) -> MergedModule:
    """DELLA (arXiv:2406.11617): entries are dropped by their rank in the row, then signs are elected as in mergekit."""
    weights, drop = stack.owner_weights, _dropping_by_rank(stack, options)
    return _merged(stack, DeltaRows.of(stack), lambda r, X: _elected_mean(drop(r, X), weights, options), options, rank)


def della_linear(stack: Stack, options: DellaLinearOptions, rank: int) -> MergedModule:
    """DELLA without the election (arXiv:2406.11617)."""
    weights, drop = stack.owner_weights, _dropping_by_rank(stack, options)
    return _merged(stack, DeltaRows.of(stack), lambda r, X: rules.weighted_sum(drop(r, X), weights), options, rank)


def breadcrumbs(stack: Stack, options: BreadcrumbsOptions, rank: int) -> MergedModule:
    """Model Breadcrumbs (arXiv:2312.06795): neither the largest entries nor the smallest."""
    deltas, weights = DeltaRows.of(stack), stack.owner_weights
    keep = _middle(deltas, options)
    return _merged(stack, deltas, lambda _, X: rules.weighted_sum(keep(X), weights), options, rank)


def breadcrumbs_ties(stack: Stack, options: BreadcrumbsTiesOptions, rank: int) -> MergedModule:
    """Model Breadcrumbs (arXiv:2312.06795), then signs are elected as in mergekit."""
    deltas, weights = DeltaRows.of(stack), stack.owner_weights
    keep = _middle(deltas, options)
    return _merged(stack, deltas, lambda _, X: _elected_mean(keep(X), weights, options), options, rank)


def sce(stack: Stack, options: SceOptions, rank: int) -> MergedModule:
    """SCE (arXiv:2408.07990): the positions where the deltas vary most, weights by energy, minority signs erased."""
    deltas = DeltaRows.of(stack)
    sizes = stack.owner_weights.to(deltas.A[0].dtype)[:, None, None]
    border = _variance_border(deltas, sizes, options.density)

    def select(X: Tensor) -> Tensor:
        scaled = X * sizes
        return scaled if border is None else scaled * (_variance(scaled) >= border)

    energies = torch.zeros(len(deltas.A), dtype=torch.float64, device=sizes.device)
    if border is None:
        energies = stack.products.diagonal() * stack.owner_weights.square()
    else:
        for _, block in deltas.blocks():
            energies += select(block).square().flatten(1).sum(1)
    total = energies.sum()
    weights = energies / total if float(total) > 0 else torch.full_like(energies, 1 / len(energies))

    def combine(_: int, X: Tensor) -> Tensor:
        kept = select(X)
        # the vote is without the weights by energy, the mean with them
        agree = kept.sign() == torch.where(kept.sum(0) >= 0, 1.0, -1.0)
        shares = weights.to(kept.dtype)[:, None, None] * agree
        divisor = shares.sum(0)
        return (kept * shares).sum(0) / torch.where(divisor == 0, 1.0, divisor)

    return _merged(stack, deltas, combine, options, rank)


def _elected_mean(
    X: Tensor, weights: Tensor, options: TiesMergekitOptions | DellaOptions | BreadcrumbsTiesOptions
) -> Tensor:
    return rules.elected_mean(X, weights, options.majority_sign_method, normalize=options.normalize)


def _trimming(deltas: DeltaRows, density: float) -> Callable[[Tensor], Tensor]:
    """Keeps of each delta its largest |entries|; those at the border all stay."""
    if density >= 1:
        return lambda X: X
    kept = rules.kept_count(density, deltas.entries)
    found = largest(deltas, torch.abs, [[kept]] * len(deltas.A))
    return lambda X: torch.stack([rules.above(x, border) for x, (border,) in zip(X, found, strict=True)])


def _middle(deltas: DeltaRows, options: BreadcrumbsOptions) -> Callable[[Tensor], Tensor]:
    """Keeps `density` of each delta's entries below its largest `gamma`."""
    if options.density >= 1:
        return lambda X: X
    kept = rules.kept_count(options.density, deltas.entries)
    # what is to be kept comes first: then fewer of the largest go
    dropped = min(rules.kept_count(options.gamma, deltas.entries), deltas.entries - kept)
    found = largest(deltas, torch.abs, [[dropped, dropped + kept]] * len(deltas.A))
    upper, lower = _per_delta(deltas, found, 0), _per_delta(deltas, found, 1)
    return lambda X: X * ((X.abs() < upper) & (X.abs() >= lower))


def _per_delta(deltas: DeltaRows, found: list[list[float]], number: int) -> Tensor:
    """(N, 1, 1)."""
    return torch.tensor([values[number] for values in found], dtype=torch.float64).to(deltas.A[0])[:, None, None]


def _dropping(stack: Stack, options: DareSvdOptions) -> Combine:
    seeds = rules.seeds(stack, options.seed)
    return lambda row, X: torch.stack(
        [rules.dropped(x, options.density, seed, row) for x, seed in zip(X, seeds, strict=True)]
    )


def _dropping_by_rank(stack: Stack, options: DellaLinearOptions) -> Combine:
    """Per row, the keep probability rises with the rank of the |entry| from density − ε to density + ε."""
    seeds = rules.seeds(stack, options.seed)

    def drop(row: int, X: Tensor) -> Tensor:
        if options.density >= 1:
            return X
        probabilities = keep_probabilities(X, options.density, options.epsilon)
        uniform = torch.stack([rules.uniform_rows(seed, row, *X.shape[1:]) for seed in seeds]).to(X.device)
        kept = X * (uniform < probabilities)
        return kept / probabilities if options.rescale else kept

    return drop


def keep_probabilities(X: Tensor, density: float, epsilon: float) -> Tensor:
    """Of entries (…, rows, columns), linear in the rank of |entry| in its row."""
    columns = X.shape[-1]
    if columns == 1:
        return torch.full_like(X, density)
    ranks = torch.arange(columns, dtype=X.dtype, device=X.device) / (columns - 1)
    probabilities = (density - epsilon + 2 * epsilon * ranks).expand_as(X)
    return torch.empty_like(X).scatter_(-1, _order(X.abs()), probabilities)


def _order(magnitude: Tensor) -> Tensor:
    """Positions along the last dimension by rising value; equal values by position."""
    if magnitude.dtype != torch.float32 or magnitude.device.type != "cpu":
        return magnitude.argsort(dim=-1, stable=True)
    # Floats above 0 order as their bits do. With the position below them they are integers that all differ, and numpy
    # sorts those several times faster than torch finds a stable order.
    keys = magnitude.contiguous().view(torch.int32).to(torch.int64) << 32
    keys |= torch.arange(magnitude.shape[-1])
    keys.numpy().sort(axis=-1)
    return keys & 0xFFFFFFFF


def _variance(X: Tensor) -> Tensor:
    """Over the first dimension. (torch.var along it is ten times slower.)"""
    return (X - X.mean(0)).square_().mean(0)


def _variance_border(deltas: DeltaRows, sizes: Tensor, density: float) -> float | None:
    """The least variance between the deltas that a selected position has; None when all are selected."""
    if density >= 1 or len(deltas.A) == 1:
        return None
    rows = torch.stack([B.abs().amax(1) for B in deltas.B]).amax(0).count_nonzero()
    columns = torch.stack([A.abs().amax(0) for A in deltas.A]).amax(0).count_nonzero()
    kept = rules.kept_count(density, int(rows) * int(columns))

    def variance(X: Tensor) -> Tensor:
        return _variance(X * sizes.view(-1, *(1,) * (X.dim() - 1)))[None]

    return largest(deltas, variance, [[kept]])[0][0]


def _merged(stack: Stack, deltas: DeltaRows, combine: Combine, options: EntrywiseOptions, rank: int) -> MergedModule:
    """The combined rows at min(rank, d_out, d_in) components."""

    def blocks() -> Iterator[Tensor]:
        for row, block in deltas.blocks():
            yield combine(row, block) * options.scale

    # the exact sum's own directions are the best guess of those of the result
    svd = core_svd(stack.A, stack.B, stack.weights, stack.gram_A, stack.gram_B)
    start = stack.A.T @ svd.right[:, :rank].to(stack.A.dtype)
    low = row_svd(blocks, deltas.shape, rank, start, options.passes)
    figures: Mapping[str, float] = {"truncation_error": low.truncation_error}
    return MergedModule(low.A, low.B, stack, None, figures=figures)
