"""Weighted k-means on inner products alone, with optional sign alignment.

With D ≫ n, k-means of n points in R^D needs nothing but their Gram matrix G: for cluster sums S_c = Σ wᵢσᵢxᵢ of mass
W_c, the squared distance of xᵢ to the centre S_c/W_c is Gᵢᵢ − 2⟨xᵢ,S_c⟩/W_c + ‖S_c‖²/W_c². Greedy k-means++, Lloyd's
iterations and the local improvement therefore run in n dimensions, exactly.

In signed problems a point may enter its cluster as xᵢ or −xᵢ (σᵢ = ±1), whichever is nearer: a rank component (b, a)
and (−b, −a) are the same matrix.

The loops are compiled (numba) and release the interpreter lock, so that modules are clustered side by side in threads.
Names inside: P[c, i] = ⟨xᵢ, S_c⟩, mass[c] = W_c, squared[c] = ‖S_c‖².
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from merge.kmeans_loops import adjusted_rand, solve

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

REFINED_POINTS = 256
"""Restarts that are improved beyond Lloyd: as many as hold this many points together, at least two. Small pools, where
a single bad restart shows, get all of theirs; a pool of 128 gets its best two."""


@dataclass(frozen=True, slots=True, eq=False)
class Clustering:
    """The best partition found.

    Attributes:
        labels: (n,) cluster of each point, numbered by their first members.
        signs: (n,) ±1.0, the sign with which each point enters its cluster.
        inertia: Σ wᵢ‖xᵢ − σᵢμ‖².
        agreement: adjusted Rand index between the two best restarts; 1 when there is only one.
    """

    labels: Integers
    signs: Floats
    inertia: float
    agreement: float


def gram_kmeans(
    gram: Floats,
    weights: Floats,
    clusters: int,
    *,
    signed: bool = False,
    n_init: int = 10,
    max_iter: int = 300,
    tolerance: float = 0.0,
    seed: int = 0,
    refine: bool = True,
) -> Clustering:
    """Cluster n weighted points, given by their Gram matrix.

    Args:
        gram: (n, n) inner products.
        weights: (n,) positive weights.
        clusters: k, with 1 ≤ k ≤ n. No cluster of the result is empty.
        signed: let points enter with either sign.
        n_init: restarts of greedy k-means++ (2 + ⌊ln k⌋ candidates a step, as scikit-learn), all drawn from `seed`.
        max_iter, tolerance: Lloyd stops when assignments rest, when the squared shift of all centres together is at
            most `tolerance`, or after `max_iter` iterations.
        refine: improve the best restarts by single-point moves and centre swaps until none helps.

    Raises:
        ValueError: k outside 1…n.
    """
    n = len(gram)
    if not 1 <= clusters <= n:
        raise ValueError(f"{clusters} clusters of {n} points")
    if clusters == n:
        return Clustering(np.arange(n), np.ones(n), 0.0, 1.0)
    candidates = 2 + int(math.log(clusters))
    draws = np.random.default_rng(seed).random((n_init, clusters, candidates))
    refined = min(n_init, max(2, REFINED_POINTS // n)) if refine else 0
    labels, signs, inertia, second = solve(
        np.ascontiguousarray(gram, dtype=np.float64),
        np.ascontiguousarray(weights, dtype=np.float64),
        clusters,
        signed,
        draws,
        max_iter,
        float(tolerance),
        refined,
    )
    agreement = adjusted_rand(labels, second, clusters) if n_init > 1 else 1.0
    order = np.unique(labels, return_index=True)[1].argsort()
    renumber = np.empty(clusters, dtype=np.int64)
    renumber[order] = np.arange(clusters)
    return Clustering(renumber[labels], signs, float(inertia), float(agreement))


def sklearn_tolerance(gram: Floats, dimensions: int, tol: float) -> float:
    """scikit-learn's rule, `tol` × the mean variance of a feature, from the Gram matrix of points in R^`dimensions`."""
    n = len(gram)
    variance = np.trace(gram) / n - gram.sum() / n**2
    return tol * max(float(variance), 0.0) / dimensions
