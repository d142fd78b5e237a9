"""LoRA-LEGO (arXiv:2409.16167): rank-wise clustering of minimal semantic units.

Each rank component of each adapter, the concatenation of a row of A and the column of B that belongs to it (Def. 1), is
one point. Per module, k-means groups the points of all adapters; each cluster's mean, with its norm restored, becomes
one component of the merged adapter:

    μ_c = weighted mean of the members,   f_c = mean ‖s‖_∞ / ‖μ_c‖_∞,   ΔW' = √(r/k)·Σ_c f_c²·b̄_c·ā_cᵀ
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from artifacts.algebra import core_svd, truncated_factors
from merge import cluster_loops
from merge.coordinates import Product
from merge.kmeans import Clustering, gram_kmeans, sklearn_tolerance
from merge.options import LegoOptions
from merge.products import of_columns, of_rows
from merge.result import ClusterReport, MergedModule
from merge.rules import compiled
from merge.stack import Stack

NEGLIGIBLE_NORM = 1e-12
"""A mean of at most this ‖·‖_∞ has no direction that reweighting could restore."""


def merge(stack: Stack, options: LegoOptions, rank: int) -> MergedModule:
    """Merge one module into min(rank, n) components."""
    units = _canonicalized(stack, options)
    k = min(rank, units.size)
    signs = _canonical_signs(units) if options.sign_alignment == "canonical" else torch.ones_like(units.weights)
    features = _feature_gram(units, options) * signs[:, None] * signs
    clustering = _cluster(features, units, k, options)
    labels = torch.from_numpy(clustering.labels).to(units.A.device)
    signs = signs * torch.from_numpy(clustering.signs).to(signs)
    means = _means(labels, signs, units.weights, k)
    averages = _averages(units, labels, means)
    factors, capped = _reweighting(units, means, labels, averages, options)
    gain = _output_gain(units, k, options)
    A = averages.A * factors[:, None].to(averages.A.dtype)
    B = averages.B * (factors * gain).to(averages.B.dtype)
    report = ClusterReport(
        inertia=clustering.inertia,
        sizes=tuple(torch.bincount(labels, minlength=k).tolist()),
        mean_cosine=_mean_cosine(features, labels, torch.from_numpy(clustering.signs).to(signs), k),
        agreement=clustering.agreement,
        largest_factor=float(factors.max()),
        capped=capped,
    )
    coordinates = Product(means.T * (factors**2 * gain), means)
    return MergedModule(A, B, units, coordinates, report)


@dataclass(frozen=True, slots=True, eq=False)
class _Averages:
    """Cluster means: A (k, d_in) and B (d_out, k)."""

    A: Tensor
    B: Tensor


def _averages(units: Stack, labels: Tensor, means: Tensor) -> _Averages:
    """Of the members of each cluster, by their coordinates (k, n)."""
    if not (compiled(units.A) and compiled(units.B)):
        return _Averages(of_rows(means, units.A), of_columns(units.B, means.T))
    members = labels.argsort(stable=True)
    starts = torch.nn.functional.pad(torch.bincount(labels, minlength=len(means)).cumsum(0), (1, 0)).numpy()
    factors = means[labels[members], members].float().numpy()
    A, B = units.A.new_empty(len(means), units.A.shape[1]), units.B.new_empty(units.B.shape[0], len(means))
    cluster_loops.row_sums(units.A.numpy(), members.numpy(), starts, factors, A.numpy())
    cluster_loops.column_sums(units.B.numpy(), members.numpy(), starts, factors, B.numpy())
    return _Averages(A, B)


def _canonicalized(stack: Stack, options: LegoOptions) -> Stack:
    """The same ΔWᵢ by other components: LEGO depends on how ΔW is split, so the split may be fixed by a rule."""
    if options.canonicalize == "balanced":
        a, b = stack.gram_A.diagonal().sqrt(), stack.gram_B.diagonal().sqrt()
        root = torch.where((a > 0) & (b > 0), (b / a).sqrt(), 1.0).to(stack.A.dtype)
        return stack.with_factors(stack.A * root[:, None], stack.B / root).ordered()
    if options.canonicalize == "svd":
        A, B = torch.empty_like(stack.A), torch.empty_like(stack.B)
        for owner in torch.unique(stack.owners):
            own = stack.owners == owner
            part_A, part_B = stack.A[own], stack.B[:, own]
            ones = torch.ones_like(stack.weights[own])
            svd = core_svd(part_A, part_B, ones, stack.gram_A[own][:, own], stack.gram_B[own][:, own])
            A[own], B[:, own] = truncated_factors(part_A, part_B, svd, len(ones))
        return stack.with_factors(A, B).ordered()
    return stack


def _canonical_signs(units: Stack) -> Tensor:
    """(n,) ±1 that make the largest |entry| of each a positive."""
    largest = units.A.abs().argmax(dim=1, keepdim=True)
    return torch.where(units.A.gather(1, largest)[:, 0] < 0, -1.0, 1.0).to(units.weights)


def _feature_gram(units: Stack, options: LegoOptions) -> Tensor:
    """(n, n) inner products of what is clustered."""
    if options.feature == "raw":
        return units.gram_A + units.gram_B
    return _normalized(units.gram_A) + _normalized(units.gram_B)


def _normalized(gram: Tensor) -> Tensor:
    """Cosines; a zero vector is orthogonal to everything."""
    norms = gram.diagonal().sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    return gram * inverse[:, None] * inverse


def _cluster(features: Tensor, units: Stack, k: int, options: LegoOptions) -> Clustering:
    matrix = features.cpu().numpy()
    dimensions = units.A.shape[1] + units.B.shape[0]
    return gram_kmeans(
        matrix,
        units.weights.cpu().numpy(),
        k,
        signed=options.sign_alignment == "cluster",
        n_init=options.n_init,
        max_iter=options.max_iter,
        tolerance=sklearn_tolerance(matrix, dimensions, options.tol),
        seed=options.seed,
        refine=options.refine,
    )


def _means(labels: Tensor, signs: Tensor, weights: Tensor, k: int) -> Tensor:
    """(k, n) coordinates of the cluster means: row c holds wᵢσᵢ/W_c at the members of c."""
    members = torch.nn.functional.one_hot(labels, k).T.to(weights.dtype) * weights
    return members * signs / members.sum(1, keepdim=True)


def _reweighting(
    units: Stack, means: Tensor, labels: Tensor, averages: _Averages, options: LegoOptions
) -> tuple[Tensor, int]:
    """(k,) factors f_c = weighted mean norm of the members / norm of their mean, and how many were capped."""
    k = means.shape[0]
    if not options.parameter_reweight:
        return torch.ones(k, dtype=means.dtype, device=means.device), 0
    if options.parameter_reweight == "inf":
        norms = units.largest
        of_mean = torch.maximum(_largest(averages.A, 1), _largest(averages.B, 0))
    else:
        both = units.gram_A + units.gram_B
        norms = both.diagonal().sqrt()
        of_mean = torch.einsum("ki,ij,kj->k", means, both, means).clamp_min(0).sqrt()
    mean_norm = means.abs() @ norms
    restorable = of_mean > NEGLIGIBLE_NORM
    factors = torch.where(restorable, mean_norm / of_mean.clamp_min(NEGLIGIBLE_NORM), 1.0)
    # The triangle inequality gives f ≥ 1; a value below is rounding of the mean.
    factors = factors.clamp_min(1.0)
    if options.reweight_cap is None:
        return factors, 0
    return factors.clamp_max(options.reweight_cap), int((factors > options.reweight_cap).sum())


def _largest(matrix: Tensor, dim: int) -> Tensor:
    """max |entry| along a dimension. (torch.aminmax would save the copy and is 15 times slower on a CPU.)"""
    return matrix.abs().amax(dim=dim).double()


def _output_gain(units: Stack, k: int, options: LegoOptions) -> float:
    """√(r/k)·scale, with r the weighted mean rank of the owners unless it is given."""
    if not options.output_reweight:
        return options.scale
    reference = options.reference_rank
    if reference is None:
        weights = units.owner_weights.tolist()
        reference = math.fsum(w * r for w, r in zip(weights, units.ranks, strict=True)) / math.fsum(weights)
    return math.sqrt(reference / k) * options.scale


def _mean_cosine(features: Tensor, labels: Tensor, signs: Tensor, k: int) -> float | None:
    """Mean cosine over all pairs of members of one cluster, signs aligned; None without such a pair."""
    cosines = _normalized(features) * signs[:, None] * signs
    same = labels[:, None] == labels
    pairs = int(same.sum()) - len(labels)
    if not pairs:
        return None
    return float((cosines * same).sum() - cosines.diagonal().sum()) / pairs
