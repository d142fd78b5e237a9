"""The compiled loops of `merge.kmeans`; see there for the mathematics and the names."""

from __future__ import annotations

import numpy as np
from numba import njit

RELATIVE_GAIN = 1e-10
"""Improvements smaller than this share of Σ wᵢ‖xᵢ‖² are rounding."""

SWAPS_TRIED = 3
"""Most promising centre swaps that are followed to their end, per round."""

compiled = njit(cache=True, nogil=True)
summing = njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "contract"})
"""Sums of many terms in several lanes at once; the order of the terms is that of the compiled code, always the same."""


@compiled
def squared_distances(gram, signed):
    """(n, n) between the points; to the nearer of x and −x in a signed problem."""
    n = len(gram)
    distances = np.empty((n, n))
    for i in range(n):
        for j in range(n):
            product = abs(gram[i, j]) if signed else gram[i, j]
            distances[i, j] = max(gram[i, i] + gram[j, j] - 2.0 * product, 0.0)
    return distances


@compiled
def draw(running, uniform):
    """Index drawn with the probability that its mass has in the whole, by the running sums of the masses."""
    target, index = uniform * running[-1], 0
    for total in running:
        index += total <= target
    # rounding: the last that has a mass
    while index == len(running) or (index > 0 and running[index - 1] == running[-1]):
        index -= 1
    return index


@summing
def potential_with(nearest, distances, weights, trial):
    """Σ w·min(nearest, distances), whose terms without w are left in `trial`."""
    total = 0.0
    for i in range(len(nearest)):
        trial[i] = distances[i] if distances[i] < nearest[i] else nearest[i]
        total += trial[i] * weights[i]
    return total


@compiled
def plus_plus(distances, weights, k, draws):
    """Greedy k-means++: indices (k,) of the seeds. draws: (k, L) uniform numbers."""
    n = len(distances)
    seeds = np.empty(k, dtype=np.int64)
    seeds[0] = draw(np.cumsum(weights), draws[0, 0])
    nearest = distances[seeds[0]].copy()
    trial, best = np.empty(n), np.empty(n)
    for step in range(1, k):
        running = np.cumsum(nearest * weights)
        lowest = np.inf
        for j in range(draws.shape[1]):
            candidate = draw(running, draws[step, j])
            potential = potential_with(nearest, distances[candidate], weights, trial)
            if j == 0 or potential < lowest:  # one is taken even where potentials overflow
                lowest = potential
                seeds[step] = candidate
                trial, best = best, trial
        nearest[:] = best
    return seeds


@compiled
def assign_to_seeds(gram, distances, seeds, signed):
    """Labels and signs of the points when each joins its nearest seed."""
    n = len(gram)
    labels, signs = np.zeros(n, dtype=np.int64), np.ones(n)
    lowest = distances[seeds[0]].copy()
    for c in range(1, len(seeds)):
        row = distances[seeds[c]]
        for i in range(n):
            nearer = row[i] < lowest[i]
            labels[i] = c if nearer else labels[i]
            lowest[i] = row[i] if nearer else lowest[i]
    if signed:
        for i in range(n):
            if gram[i, seeds[labels[i]]] < 0.0:
                signs[i] = -1.0
    return labels, signs


@compiled
def measure(gram, weights, labels, signs, k):
    """P (k, n), mass, squared and counts (k,) of a partition."""
    n = len(gram)
    P, mass, squared = np.zeros((k, n)), np.zeros(k), np.zeros(k)
    counts = np.zeros(k, dtype=np.int64)
    for i in range(n):
        c, factor = labels[i], weights[i] * signs[i]
        counts[c] += 1
        mass[c] += weights[i]
        for j in range(n):
            P[c, j] += factor * gram[i, j]
    for i in range(n):
        squared[labels[i]] += weights[i] * signs[i] * P[labels[i], i]
    return P, mass, squared, counts


@compiled
def nearest_centres(gram, P, mass, squared, counts, signed):
    """Label, first and second smallest squared distance of each point to the centres of non-empty clusters."""
    k, n = P.shape
    labels = np.zeros(n, dtype=np.int64)
    first, second = np.full(n, np.inf), np.full(n, np.inf)
    for c in range(k):
        if counts[c] == 0:
            continue
        inverse = 1.0 / mass[c]
        norm = squared[c] * inverse * inverse
        for i in range(n):
            product = abs(P[c, i]) if signed else P[c, i]
            distance = norm - 2.0 * product * inverse
            if distance < first[i]:
                second[i] = first[i]
                first[i] = distance
                labels[i] = c
            elif distance < second[i]:
                second[i] = distance
    for i in range(n):
        first[i] = max(first[i] + gram[i, i], 0.0)
        second[i] = max(second[i] + gram[i, i], 0.0)
    return labels, first, second


@compiled
def signs_towards(P, labels, signed):
    n = len(labels)
    signs = np.ones(n)
    if signed:
        for i in range(n):
            if P[labels[i], i] < 0.0:
                signs[i] = -1.0
    return signs


@compiled
def fill_empty(labels, cost, k):
    """Give every empty cluster the point farthest from its centre (cost: weighted squared distance, (n,)).

    A point alone in its cluster is never taken, so the inertia can only fall, and k ≤ n clusters are always filled.
    """
    counts = np.zeros(k, dtype=np.int64)
    for label in labels:
        counts[label] += 1
    for c in range(k):
        if counts[c] > 0:
            continue
        farthest, point = -1.0, -1
        for i in range(len(labels)):
            if counts[labels[i]] > 1 and cost[i] > farthest:
                farthest, point = cost[i], i
        counts[labels[point]] -= 1
        counts[c] = 1
        labels[point] = c
        cost[point] = -1.0


@compiled
def inertia_of(gram, weights, labels, signs, k):
    _, mass, squared, counts = measure(gram, weights, labels, signs, k)
    total = 0.0
    for i in range(len(gram)):
        total += weights[i] * gram[i, i]
    for c in range(k):
        if counts[c] > 0:
            total -= squared[c] / mass[c]
    return max(total, 0.0)


@compiled
def centre_shift(P, mass, squared, weights, labels, signs, new_mass, new_squared):
    """Σ_c ‖μ_c − μ'_c‖² between the centres measured in P and those of the new partition."""
    k = len(mass)
    cross = np.zeros(k)
    for i in range(len(labels)):
        cross[labels[i]] += weights[i] * signs[i] * P[labels[i], i]
    shift = 0.0
    for c in range(k):
        if mass[c] > 0.0 and new_mass[c] > 0.0:
            shift += squared[c] / mass[c] ** 2 + new_squared[c] / new_mass[c] ** 2
            shift -= 2.0 * cross[c] / (mass[c] * new_mass[c])
    return shift


@compiled
def lloyd(gram, weights, labels, signs, k, signed, max_iter, tolerance):
    """Lloyd's iterations from a partition; returns a partition without empty clusters."""
    cost = np.zeros(len(gram))
    fill_empty(labels, cost, k)
    P, mass, squared, counts = measure(gram, weights, labels, signs, k)
    for _ in range(max_iter):
        new_labels, first, _ = nearest_centres(gram, P, mass, squared, counts, signed)
        new_signs = signs_towards(P, new_labels, signed)
        fill_empty(new_labels, first * weights, k)
        if np.array_equal(new_labels, labels) and np.array_equal(new_signs, signs):
            break
        old_P, old_mass, old_squared = P, mass, squared
        labels, signs = new_labels, new_signs
        P, mass, squared, counts = measure(gram, weights, labels, signs, k)
        if centre_shift(old_P, old_mass, old_squared, weights, labels, signs, mass, squared) <= tolerance:
            break
    return labels, signs


@compiled
def joining(gram, weights, labels, P, mass, squared, b, signed, gains):
    """What cluster b brings each point that joins it, less what it costs there without: (n,), −∞ for its members.

    Moving x (weight w, sign σ) from cluster a to b changes Σ_c ‖S_c‖²/W_c by
    (‖S_b ± wx‖²/(W_b + w) − ‖S_b‖²/W_b) + (‖S_a − wσx‖²/(W_a − w) − ‖S_a‖²/W_a), all known from P: the first is this,
    the second `leaving`; the inertia falls by their sum.
    """
    kept, row = squared[b] / mass[b], P[b]
    for i in range(len(labels)):
        w = weights[i]
        product = abs(row[i]) if signed else row[i]
        gain = (squared[b] + 2.0 * w * product + w * w * gram[i, i]) / (mass[b] + w) - kept
        gains[i] = -np.inf if labels[i] == b else gain


@compiled
def leaving(gram, weights, labels, signs, P, mass, squared, counts, i):
    """The second part of what `joining` tells, for point i; −∞ where it is alone in its cluster."""
    a, w = labels[i], weights[i]
    if counts[a] < 2:
        return -np.inf
    rest = squared[a] - 2.0 * w * signs[i] * P[a, i] + w * w * gram[i, i]
    return rest / (mass[a] - w) - squared[a] / mass[a]


@compiled
def best_move(joined, left, best):
    """(gain, point, target) of the single-point move that lowers the inertia most, of (k, n) and (n,) gains.

    Args:
        best: (n,) room for the largest gain of each point.
    """
    k, n = joined.shape
    best[:] = joined[0]
    for b in range(1, k):
        row = joined[b]
        for i in range(n):
            best[i] = row[i] if row[i] > best[i] else best[i]
    gain, point, target = 0.0, -1, -1
    for i in range(n):
        if best[i] + left[i] > gain:
            gain, point = best[i] + left[i], i
    if point >= 0:
        target = 0
        while joined[target, point] != best[point]:
            target += 1
    return gain, point, target


@compiled
def move_points(gram, weights, labels, signs, k, signed):
    """Hartigan and Wong (1979): move the best point, in place, until no move helps."""
    n = len(gram)
    P, mass, squared, counts = measure(gram, weights, labels, signs, k)
    threshold = RELATIVE_GAIN * np.sum(weights * np.diag(gram))
    joined, left, best = np.empty((k, n)), np.empty(n), np.empty(n)
    for b in range(k):
        joining(gram, weights, labels, P, mass, squared, b, signed, joined[b])
    for i in range(n):
        left[i] = leaving(gram, weights, labels, signs, P, mass, squared, counts, i)
    while True:
        gain, point, b = best_move(joined, left, best)
        if gain <= threshold:
            return
        a, w, sign = labels[point], weights[point], signs[point]
        new_sign = -1.0 if signed and P[b, point] < 0.0 else 1.0
        term = w * w * gram[point, point]
        squared[a] += term - 2.0 * w * sign * P[a, point]
        squared[b] += term + 2.0 * w * new_sign * P[b, point]
        for j in range(n):
            P[a, j] -= w * sign * gram[point, j]
            P[b, j] += w * new_sign * gram[point, j]
        mass[a] -= w
        mass[b] += w
        counts[a] -= 1
        counts[b] += 1
        labels[point] = b
        signs[point] = new_sign
        # of the other clusters nothing has changed
        joining(gram, weights, labels, P, mass, squared, a, signed, joined[a])
        joining(gram, weights, labels, P, mass, squared, b, signed, joined[b])
        for i in range(n):
            if labels[i] == a or labels[i] == b:
                left[i] = leaving(gram, weights, labels, signs, P, mass, squared, counts, i)


@compiled
def promising_swaps(gram, distances, weights, labels, signs, k, signed):
    """For each cluster that could be dissolved: the point to open a new one at, and the cost right after that swap.

    With d₁, d₂ the distances to the nearest and the second nearest centre, that cost is
    Σₓ w·min(D(x,p), d₁) + Σ_{x∈c} w·(min(D(x,p), d₂) − min(D(x,p), d₁)).
    """
    n = len(gram)
    P, mass, squared, counts = measure(gram, weights, labels, signs, k)
    nearest, first, second = nearest_centres(gram, P, mass, squared, counts, signed)
    points, costs = np.zeros(k, dtype=np.int64), np.full(k, np.inf)
    extra = np.empty(k)
    for p in range(n):
        base = 0.0
        extra[:] = 0.0
        for x in range(n):
            distance = distances[p, x]
            near = min(distance, first[x])
            base += weights[x] * near
            extra[nearest[x]] += weights[x] * (min(distance, second[x]) - near)
        for c in range(k):
            if base + extra[c] < costs[c]:
                costs[c] = base + extra[c]
                points[c] = p
    return points, costs


@compiled
def swapped(gram, weights, labels, signs, k, signed, dissolved, point):
    """The partition after dissolving a cluster and opening one at `point` under its number."""
    n = len(gram)
    P, mass, squared, counts = measure(gram, weights, labels, signs, k)
    for j in range(n):
        P[dissolved, j] = gram[point, j]
    mass[dissolved], squared[dissolved], counts[dissolved] = 1.0, gram[point, point], 1
    new_labels, first, _ = nearest_centres(gram, P, mass, squared, counts, signed)
    fill_empty(new_labels, first * weights, k)
    return new_labels, signs_towards(P, new_labels, signed)


@compiled
def improve(gram, distances, weights, labels, signs, k, signed, max_iter):
    """Alternate point moves and centre swaps until neither lowers the inertia."""
    labels, signs = labels.copy(), signs.copy()
    move_points(gram, weights, labels, signs, k, signed)
    best = inertia_of(gram, weights, labels, signs, k)
    threshold = RELATIVE_GAIN * np.sum(weights * np.diag(gram))
    improved = k > 1
    while improved:
        improved = False
        points, costs = promising_swaps(gram, distances, weights, labels, signs, k, signed)
        for c in np.argsort(costs)[:SWAPS_TRIED]:
            trial, trial_signs = swapped(gram, weights, labels, signs, k, signed, c, points[c])
            trial, trial_signs = lloyd(gram, weights, trial, trial_signs, k, signed, max_iter, 0.0)
            move_points(gram, weights, trial, trial_signs, k, signed)
            score = inertia_of(gram, weights, trial, trial_signs, k)
            if score < best - threshold:
                best, labels, signs = score, trial, trial_signs
                improved = True
                break
    return labels, signs, best


@compiled
def solve(gram, weights, k, signed, draws, max_iter, tolerance, refined):
    """All restarts; the `refined` best ones are improved. Returns labels, signs, inertia and the runner-up's labels."""
    restarts, n = draws.shape[0], len(gram)
    labels, signs = np.empty((restarts, n), dtype=np.int64), np.empty((restarts, n))
    scores, distances = np.empty(restarts), squared_distances(gram, signed)
    for r in range(restarts):
        seeds = plus_plus(distances, weights, k, draws[r])
        start, start_signs = assign_to_seeds(gram, distances, seeds, signed)
        labels[r], signs[r] = lloyd(gram, weights, start, start_signs, k, signed, max_iter, tolerance)
        scores[r] = inertia_of(gram, weights, labels[r], signs[r], k)
    # mergesort is stable: equal scores keep the order of their draws
    for r in np.argsort(scores, kind="mergesort")[:refined]:
        labels[r], signs[r], scores[r] = improve(gram, distances, weights, labels[r], signs[r], k, signed, max_iter)
    order = np.argsort(scores, kind="mergesort")
    runner_up = order[1] if restarts > 1 else order[0]
    return labels[order[0]], signs[order[0]], scores[order[0]], labels[runner_up]


@compiled
def adjusted_rand(first, second, k):
    """Adjusted Rand index of two labelings with labels below k; 1 for identical partitions."""
    table = np.zeros((k, k))
    for i in range(len(first)):
        table[first[i], second[i]] += 1.0
    rows, columns = table.sum(axis=1), table.sum(axis=0)
    both = np.sum(table * (table - 1.0)) / 2.0
    in_rows, in_columns = np.sum(rows * (rows - 1.0)) / 2.0, np.sum(columns * (columns - 1.0)) / 2.0
    n = len(first)
    expected = in_rows * in_columns / max(n * (n - 1.0) / 2.0, 1.0)
    spread = (in_rows + in_columns) / 2.0 - expected
    if abs(spread) < 1e-12:
        return 1.0
    return (both - expected) / spread
