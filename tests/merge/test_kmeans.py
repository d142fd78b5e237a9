"""k-means in the Gram space against scikit-learn in the full space, and against exhaustive search."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from merge.kmeans import gram_kmeans, sklearn_tolerance
from merge.kmeans_loops import adjusted_rand, assign_to_seeds, lloyd, squared_distances


def inertia(X: np.ndarray, labels: np.ndarray, signs: np.ndarray, weights: np.ndarray) -> float:
    """By the definition, in the full space."""
    total, points = 0.0, X * signs[:, None]
    for c in np.unique(labels):
        members = labels == c
        mean = np.average(points[members], axis=0, weights=weights[members])
        total += float((weights[members] * ((points[members] - mean) ** 2).sum(1)).sum())
    return total


@pytest.mark.parametrize("seed", range(10))
def test_oracle_5_lloyd_equals_sklearn_from_the_same_seeds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(60, 200)) + 3 * rng.normal(size=(6, 200))[rng.integers(0, 6, 60)]
    weights = rng.uniform(0.5, 2, 60)
    start = rng.choice(60, 8, replace=False)
    reference = KMeans(8, init=X[start], n_init=1, tol=0, algorithm="lloyd").fit(X, sample_weight=weights)
    G = X @ X.T
    labels, signs = assign_to_seeds(G, squared_distances(G, False), start.astype(np.int64), False)
    labels, signs = lloyd(G, weights, labels, signs, 8, False, 300, 0.0)
    assert (labels == reference.labels_).all()
    assert inertia(X, labels, signs, weights) == pytest.approx(reference.inertia_, rel=1e-12)
    centres = np.stack([np.average(X[labels == c], axis=0, weights=weights[labels == c]) for c in range(8)])
    np.testing.assert_allclose(centres, reference.cluster_centers_, rtol=1e-10, atol=1e-12)


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12), signed=st.booleans(), refine=st.booleans())
def test_the_reported_inertia_is_that_of_the_partition(seed: int, k: int, signed: bool, refine: bool) -> None:
    rng = np.random.default_rng(seed)
    X, weights = rng.normal(size=(12, 5)), rng.uniform(0.1, 3, 12)
    result = gram_kmeans(X @ X.T, weights, k, signed=signed, refine=refine, n_init=3, seed=seed)
    assert result.inertia == pytest.approx(inertia(X, result.labels, result.signs, weights), rel=1e-9, abs=1e-9)
    assert set(result.labels) == set(range(k))
    assert set(result.signs) <= ({1.0, -1.0} if signed else {1.0})
    first_members = [int(np.flatnonzero(result.labels == c)[0]) for c in range(k)]
    assert first_members == sorted(first_members)


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(2, 8))
def test_duplicates_never_leave_a_cluster_empty(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    X = np.repeat(rng.normal(size=(3, 4)), 3, axis=0)
    result = gram_kmeans(X @ X.T, np.ones(9), k, n_init=2, seed=seed)
    assert set(result.labels) == set(range(k))
    if k >= 3:
        assert result.inertia == pytest.approx(0.0, abs=1e-9)


def partitions(n: int, k: int) -> Iterator[list[int]]:
    def extend(prefix: list[int], used: int) -> Iterator[list[int]]:
        if len(prefix) == n:
            if used == k:
                yield list(prefix)
            return
        for c in range(min(used + 1, k)):
            yield from extend([*prefix, c], max(used, c + 1))

    return extend([], 0)


@pytest.mark.parametrize(("n", "k", "dimensions"), [(8, 3, 2), (9, 4, 4), (7, 3, 30)])
def test_small_pools_reach_the_global_optimum(n: int, k: int, dimensions: int) -> None:
    """At most one of 40 pools may be missed, and by less than 1 %; without refinement many are missed."""
    one_hot = np.eye(k)[np.array(list(partitions(n, k)))]  # (partitions, n, k)
    rng = np.random.default_rng(0)
    missed, unrefined = [], []
    for _ in range(40):
        X = rng.normal(size=(n, dimensions))
        sums = np.einsum("pnc,nj->pcj", one_hot, X)
        best = (X**2).sum() - ((sums**2).sum(-1) / one_hot.sum(1)).sum(1).max()
        gaps = [gram_kmeans(X @ X.T, np.ones(n), k, refine=refine).inertia / best - 1 for refine in (True, False)]
        missed.append(gaps[0])
        unrefined.append(gaps[1])
    assert min(missed) > -1e-9
    assert sum(gap > 1e-9 for gap in missed) <= 1
    assert max(missed) < 0.01
    assert np.mean(missed) <= np.mean(unrefined)


def test_refinement_never_hurts_and_beats_sklearn_on_a_flat_pool() -> None:
    rng = np.random.default_rng(3)
    X = rng.normal(size=(64, 400))
    G, ones = X @ X.T, np.ones(64)
    refined, plain = (gram_kmeans(G, ones, 8, refine=refine).inertia for refine in (True, False))
    reference = KMeans(8, n_init=10, random_state=0).fit(X).inertia_
    assert refined < plain
    assert refined < reference


def test_signed_clusters_join_a_point_and_its_negative() -> None:
    X = np.array([[1.0, 0], [-1, 0.01], [0, 2], [0.01, -2]])
    result = gram_kmeans(X @ X.T, np.ones(4), 2, signed=True)
    assert result.labels.tolist() == [0, 0, 1, 1]
    assert result.signs[0] == -result.signs[1]
    assert result.inertia < 1e-3
    assert gram_kmeans(X @ X.T, np.ones(4), 2).inertia > 1


def test_the_seed_decides() -> None:
    X = np.random.default_rng(1).normal(size=(40, 300))
    runs = [gram_kmeans(X @ X.T, np.ones(40), 5, seed=seed, refine=False, n_init=1) for seed in (7, 7, 8)]
    assert (runs[0].labels == runs[1].labels).all()
    assert (runs[0].labels != runs[2].labels).any()
    assert runs[0].agreement == 1.0


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=30))
def test_adjusted_rand_equals_sklearn(pairs: list[tuple[int, int]]) -> None:
    first, second = (np.array(side, dtype=np.int64) for side in zip(*pairs, strict=True))
    assert adjusted_rand(first, second, 4) == pytest.approx(adjusted_rand_score(first, second), abs=1e-12)


def test_the_tolerance_is_sklearns() -> None:
    X = np.random.default_rng(2).normal(size=(30, 50))
    assert sklearn_tolerance(X @ X.T, 50, 1e-4) == pytest.approx(1e-4 * X.var(axis=0).mean(), rel=1e-10)


@pytest.mark.parametrize("k", [0, 5])
def test_impossible_numbers_of_clusters(k: int) -> None:
    with pytest.raises(ValueError, match="clusters of 4 points"):
        gram_kmeans(np.eye(4), np.ones(4), k)


@pytest.mark.parametrize("signed", [False, True])
def test_potentials_that_overflow_still_give_seeds(signed: bool) -> None:
    """Infinite potentials have no least one: a point is a seed all the same."""
    points = np.random.default_rng(0).normal(size=(8, 5))
    gram = points @ points.T
    found = gram_kmeans(gram / np.abs(gram).max() * 1.7e307, np.full(8, 1e3), 3, signed=signed)
    assert set(found.labels.tolist()) == {0, 1, 2}
