"""Each step of the clustering against the points themselves: distances, centres, what a move or a swap is worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from merge import kmeans_loops as loops

Floats = NDArray[np.float64]
CASES = st.tuples(st.integers(0, 10_000), st.integers(2, 4), st.booleans())


class Case:
    """Nine weighted points in five dimensions, in a partition without empty clusters."""

    def __init__(self, seed: int, k: int, signed: bool) -> None:
        rng = np.random.default_rng(seed)
        self.k, self.signed = k, signed
        self.X, self.weights = rng.normal(size=(9, 5)), rng.uniform(0.2, 3.0, 9)
        self.gram = self.X @ self.X.T
        self.labels = rng.permutation(np.arange(9) % k)
        self.signs = rng.choice([-1.0, 1.0], 9) if signed else np.ones(9)
        self.measured = loops.measure(self.gram, self.weights, self.labels, self.signs, k)

    def centres(self, labels: Any = None, signs: Any = None) -> Floats:
        labels, signs = (self.labels if labels is None else labels), (self.signs if signs is None else signs)
        chosen = [labels == c for c in range(self.k)]
        return np.stack(
            [np.average(self.X[own] * signs[own, None], axis=0, weights=self.weights[own]) for own in chosen]
        )

    def distances(self, centres: Floats) -> Floats:
        """(k, n) squared, of the nearer of x and −x in a signed problem."""
        near = ((centres[:, None] - self.X) ** 2).sum(-1)
        return np.minimum(near, ((centres[:, None] + self.X) ** 2).sum(-1)) if self.signed else near

    def inertia(self, labels: Any, signs: Any) -> float:
        points, centres = self.X * signs[:, None], self.centres(labels, signs)
        return float((self.weights * ((points - centres[labels]) ** 2).sum(1)).sum())

    def best_move(self, labels: Any, signs: Any) -> tuple[float, int, int]:
        P, *rest = loops.measure(self.gram, self.weights, labels, signs, self.k)
        joined = np.empty((self.k, 9))
        for b in range(self.k):
            loops.joining(self.gram, self.weights, labels, P, *rest[:2], b, self.signed, joined[b])
        left = np.array([loops.leaving(self.gram, self.weights, labels, signs, P, *rest, i) for i in range(9)])
        found: tuple[float, int, int] = loops.best_move(joined, left, np.empty(9))
        return found


@settings(max_examples=40, derandomize=True, deadline=None)
@given(CASES)
def test_what_is_measured_of_a_partition(given_case: tuple[int, int, bool]) -> None:
    case = Case(*given_case)
    P, mass, squared, counts = case.measured
    own = case.labels == np.arange(case.k)[:, None]
    sums = (own * case.weights * case.signs) @ case.X
    np.testing.assert_allclose(P, sums @ case.X.T, atol=1e-10)
    np.testing.assert_allclose(mass, (own * case.weights).sum(1))
    np.testing.assert_allclose(squared, (sums**2).sum(1), atol=1e-10)
    assert counts.tolist() == own.sum(1).tolist()
    found = loops.inertia_of(case.gram, case.weights, case.labels, case.signs, case.k)
    assert found == pytest.approx(case.inertia(case.labels, case.signs), rel=1e-9)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(CASES)
def test_distances_between_points(given_case: tuple[int, int, bool]) -> None:
    case = Case(*given_case)
    found = loops.squared_distances(case.gram, case.signed)
    np.testing.assert_allclose(found, case.distances(case.X), atol=1e-10)
    assert found.min() >= 0
    seeds = np.array([2, 7], np.int64)
    labels, signs = loops.assign_to_seeds(case.gram, found, seeds, case.signed)
    assert labels.tolist() == case.distances(case.X[seeds]).argmin(0).tolist()
    turned = case.signed & (case.gram[np.arange(9), seeds[labels]] < 0)
    assert signs.tolist() == np.where(turned, -1.0, 1.0).tolist()


@settings(max_examples=40, derandomize=True, deadline=None)
@given(CASES)
def test_the_nearest_and_the_second_nearest_centre(given_case: tuple[int, int, bool]) -> None:
    case = Case(*given_case)
    P, *rest = case.measured
    labels, first, second = loops.nearest_centres(case.gram, P, *rest, case.signed)
    expected = case.distances(case.centres())
    assert labels.tolist() == expected.argmin(0).tolist()
    ordered = np.sort(expected, axis=0)
    np.testing.assert_allclose(first, ordered[0], atol=1e-9)
    np.testing.assert_allclose(second, ordered[1], atol=1e-9)
    signs = loops.signs_towards(P, labels, case.signed)
    nearer = ((case.X * signs[:, None] - case.centres()[labels]) ** 2).sum(1)
    np.testing.assert_allclose(nearer, ordered[0], atol=1e-9)
    # a cluster without members has no centre
    mass, squared, counts = rest
    counts[1] = 0
    alone, _, third = loops.nearest_centres(case.gram, P, mass, squared, counts, case.signed)
    assert 1 not in alone
    assert bool(np.isinf(third).all()) is (case.k == 2)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(CASES)
def test_how_far_centres_went(given_case: tuple[int, int, bool]) -> None:
    case = Case(*given_case)
    labels = np.roll(case.labels, 2)
    P, mass, squared, _ = case.measured
    _, new_mass, new_squared, _ = loops.measure(case.gram, case.weights, labels, case.signs, case.k)
    args = (P, mass, squared, case.weights, labels, case.signs, new_mass, new_squared)
    expected = ((case.centres() - case.centres(labels)) ** 2).sum()
    assert loops.centre_shift(*args) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(CASES)
def test_the_best_move_is_worth_what_it_says_and_no_other_more(given_case: tuple[int, int, bool]) -> None:
    case = Case(*given_case)
    gain, point, target = case.best_move(case.labels, case.signs)
    before, worth = case.inertia(case.labels, case.signs), {}
    for i in range(9):
        if (case.labels == case.labels[i]).sum() == 1:
            continue
        for b in set(range(case.k)) - {case.labels[i]}:
            labels, signs = case.labels.copy(), case.signs.copy()
            labels[i], signs[i] = b, -1.0 if case.signed and case.measured[0][b, i] < 0 else 1.0
            worth[i, b] = before - case.inertia(labels, signs)
    best = max(worth.values())
    assert gain == pytest.approx(max(best, 0.0), abs=1e-9)
    assert point == -1 if best < -1e-9 else worth.get((point, target), 0.0) == pytest.approx(max(best, 0), abs=1e-9)
    # moved until none helps
    labels, signs = case.labels.copy(), case.signs.copy()
    loops.move_points(case.gram, case.weights, labels, signs, case.k, case.signed)
    assert case.inertia(labels, signs) <= before - max(best, 0.0) + 1e-9
    assert set(labels) == set(range(case.k))
    assert case.best_move(labels, signs)[0] < 1e-6


@settings(max_examples=40, derandomize=True, deadline=None)
@given(CASES)
def test_what_a_swap_costs_at_first(given_case: tuple[int, int, bool]) -> None:
    case = Case(*given_case)
    apart = loops.squared_distances(case.gram, case.signed)
    points, costs = loops.promising_swaps(case.gram, apart, case.weights, case.labels, case.signs, case.k, case.signed)
    centres = case.centres()
    for c in range(case.k):
        swapped = [np.delete(centres, c, axis=0) for _ in range(9)]
        cost = [
            (case.weights * case.distances(np.vstack([rest, case.X[p]])).min(0)).sum() for p, rest in enumerate(swapped)
        ]
        assert costs[c] == pytest.approx(min(cost), rel=1e-9)
        assert cost[points[c]] == pytest.approx(min(cost), rel=1e-9)
        labels, signs = loops.swapped(
            case.gram, case.weights, case.labels, case.signs, case.k, case.signed, c, points[c]
        )
        opened = centres.copy()
        opened[c] = case.X[points[c]]
        nearest = case.distances(opened).argmin(0)
        if len(set(nearest)) == case.k:
            assert labels.tolist() == nearest.tolist()
            turned = (opened[labels] * case.X).sum(1) < 0
            assert signs.tolist() == np.where(turned & case.signed, -1.0, 1.0).tolist()


@settings(max_examples=40, derandomize=True, deadline=None)
@given(CASES)
def test_lloyd_and_its_improvement_only_go_down(given_case: tuple[int, int, bool]) -> None:
    case = Case(*given_case)
    start = case.inertia(case.labels, case.signs)
    once = loops.lloyd(case.gram, case.weights, case.labels, case.signs, case.k, case.signed, 1, 0.0)
    rest = loops.lloyd(case.gram, case.weights, case.labels, case.signs, case.k, case.signed, 100, 0.0)
    one, many = case.inertia(*once), case.inertia(*rest)
    assert many <= one + 1e-9 <= start + 2e-9
    again = loops.lloyd(case.gram, case.weights, *rest, case.k, case.signed, 100, 0.0)
    assert all(np.array_equal(new, old) for new, old in zip(again, rest, strict=True))
    # a generous tolerance stops after the first
    early = loops.lloyd(case.gram, case.weights, case.labels, case.signs, case.k, case.signed, 100, 1e9)
    assert all(np.array_equal(new, old) for new, old in zip(early, once, strict=True))
    apart = loops.squared_distances(case.gram, case.signed)
    labels, signs, inertia = loops.improve(case.gram, apart, case.weights, *rest, case.k, case.signed, 100)
    assert inertia == pytest.approx(case.inertia(labels, signs), rel=1e-9)
    assert inertia <= many + 1e-9


@pytest.mark.parametrize(
    ("labels", "cost", "expected"),
    [
        ([0, 0, 0, 1], [1.0, 3.0, 2.0, 9.0], [0, 2, 0, 1]),
        ([1, 1, 1, 1], [1.0, 3.0, 2.0, 4.0], [1, 2, 1, 0]),
        ([0, 1, 2, 2], [1.0, 1.0, 1.0, 1.0], [0, 1, 2, 2]),
        ([2, 2, 0, 0], [0.0, 0.0, 0.0, 0.0], [1, 2, 0, 0]),
    ],
)
def test_an_empty_cluster_gets_the_farthest_point_that_is_not_alone(
    labels: list[int], cost: list[float], expected: list[int]
) -> None:
    found = np.array(labels)
    loops.fill_empty(found, np.array(cost), 3)
    assert found.tolist() == expected


def test_draws_follow_the_masses() -> None:
    mass = np.array([0.0, 2.0, 0.0, 1.0, 1.0, 0.0])
    found = [int(loops.draw(np.cumsum(mass), at)) for at in (0.0, 0.49, 0.5, 0.74, 0.75, 0.99, 1.0)]
    assert found == [1, 1, 3, 3, 4, 4, 4]
    assert int(loops.draw(np.zeros(3), 0.5)) == 0


@settings(max_examples=40, derandomize=True, deadline=None)
@given(CASES)
def test_seeds_are_greedy(given_case: tuple[int, int, bool]) -> None:
    """Of the candidates that are drawn, the one that leaves the least to the nearest seed."""
    case = Case(*given_case)
    draws = np.random.default_rng(given_case[0]).random((case.k, 3))
    found = loops.plus_plus(loops.squared_distances(case.gram, case.signed), case.weights, case.k, draws)
    distances = case.distances(case.X)
    expected = [int(loops.draw(np.cumsum(case.weights), draws[0, 0]))]
    for step in range(1, case.k):
        nearest = distances[expected].min(0)
        running = np.cumsum(nearest * case.weights)
        tried = [int(loops.draw(running, at)) for at in draws[step]]
        left = [(np.minimum(nearest, distances[at]) * case.weights).sum() for at in tried]
        expected.append(tried[int(np.argmin(left))])
    assert found.tolist() == expected


def test_the_best_of_all_restarts_and_the_runner_up() -> None:
    case = Case(5, 3, False)
    draws = np.random.default_rng(0).random((6, 3, 3))
    alone = [loops.solve(case.gram, case.weights, 3, False, draws[r : r + 1], 100, 0.0, 0) for r in range(6)]
    scores = [score for _, _, score, _ in alone]
    labels, signs, inertia, second = loops.solve(case.gram, case.weights, 3, False, draws, 100, 0.0, 0)
    order = np.argsort(scores, kind="stable")
    assert inertia == min(scores) == pytest.approx(case.inertia(labels, signs))
    assert np.array_equal(labels, alone[order[0]][0])
    assert np.array_equal(second, alone[order[1]][0])
    assert all(np.array_equal(one, other) for one, _, _, other in alone)
    refined = loops.solve(case.gram, case.weights, 3, False, draws, 100, 0.0, 2)
    assert refined[2] <= inertia
