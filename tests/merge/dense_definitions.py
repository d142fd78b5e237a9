"""Every method as its definition says, in numpy on dense float64 deltas: slow, and with nothing of the product in it.

An adapter is (A: (r, d_in), B: (d_out, r), s: its scaling), a delta s·B·A; of masks only the seeds are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
NULL = 1e-9
"""Singular values below this beside the largest are zeros to rounding."""


@dataclass(frozen=True)
class Pool:
    """Adapters with their weights, and the seeds of their masks: of the deltas, and of the B's where those have own."""

    adapters: Sequence[tuple[Matrix, Matrix, float]]
    weights: Sequence[float]
    seeds: Sequence[int]
    seeds_b: Sequence[int]

    @cached_property
    def deltas(self) -> list[Matrix]:
        return [s * B @ A for A, B, s in self.adapters]

    @property
    def ranks(self) -> list[int]:
        return [len(A) for A, _, _ in self.adapters]

    def total(self) -> Matrix:
        return added(self.deltas, self.weights)


def added(X: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    return np.sum([w * x for w, x in zip(weights, X, strict=True)], axis=0)


def svd(X: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """U, σ, V of what is not null."""
    U, S, Vh = np.linalg.svd(X, full_matrices=False)
    there = NULL * S[0] < S
    return U[:, there], S[there], Vh[there].T


def polar(X: Matrix) -> Matrix:
    U, _, V = svd(X)
    return U @ V.T


def truncated(X: Matrix, rank: int) -> Matrix:
    U, S, V = svd(X)
    return (U[:, :rank] * S[:rank]) @ V[:, :rank].T


def trimmed(X: Matrix, density: float) -> Matrix:
    kept = int(density * X.size)
    if kept == 0:
        return np.zeros_like(X)
    return np.where(np.abs(X) >= np.sort(np.abs(X), axis=None)[-kept], X, 0)


def middle(X: Matrix, density: float, gamma: float) -> Matrix:
    """Without the largest and the smallest."""
    kept = int(density * X.size)
    first = min(int(gamma * X.size), X.size - kept)
    order = np.argsort(-np.abs(X), axis=None)[first : first + kept]
    mask = np.zeros(X.size)
    mask[order] = 1
    return X * mask.reshape(X.shape)


def drawn(shape: tuple[int, int], seed: int) -> NDArray[np.uint32]:
    """The random numbers of the entries: a hash of seed, row and column."""
    rows, columns = np.arange(1, shape[0] + 1, dtype=np.uint64), np.arange(shape[1], dtype=np.uint32)
    key = np.uint64(seed) + rows * np.uint64(0x9E3779B97F4A7C15)
    key = (key ^ key >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ key >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    key ^= key >> np.uint64(31)
    first, second = ((key >> np.uint64(shift)).astype(np.uint32)[:, None] for shift in (0, 32))
    x = first + columns
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x21F0AAAD)
    x = ((x ^ x >> np.uint32(15)) + second) * np.uint32(0x735A2D97)
    x = (x ^ x >> np.uint32(15)) * np.uint32(0x31848BAB)
    return x ^ x >> np.uint32(14)


def dropped(X: Matrix, density: float, seed: int) -> Matrix:
    return np.where(drawn(X.shape, seed) / 2**32 < density, X / density, 0)


def by_row_rank(X: Matrix, density: float, epsilon: float, seed: int) -> Matrix:
    """DELLA's dropping: the larger an entry in its row, the likelier it stays."""
    probabilities = np.empty_like(X)
    for row, chances in zip(X, probabilities, strict=True):
        ranks = np.argsort(np.argsort(np.abs(row), kind="stable"))
        chances[:] = density if len(row) == 1 else density - epsilon + 2 * epsilon * ranks / (len(row) - 1)
    return np.where((drawn(X.shape, seed) >> 8) / 2**24 < probabilities, X / probabilities, 0)


def sign_of(votes: Sequence[Matrix], election: str) -> Matrix:
    counted = votes if election == "total" else [np.sign(vote) for vote in votes]
    return np.where(np.sum(counted, axis=0) >= 0, 1.0, -1.0)


def peft_ties(X: Sequence[Matrix], weights: Sequence[float], election: str) -> Matrix:
    """Votes without weights, divided by how many agree."""
    sign = sign_of(X, election)
    agree = [(x * sign > 0).astype(float) for x in X]
    return added([x * a for x, a in zip(X, agree, strict=True)], weights) / np.maximum(np.sum(agree, axis=0), 1)


def mergekit_ties(X: Sequence[Matrix], weights: Sequence[float], election: str, normalize: bool) -> Matrix:
    """Votes with weights, divided by the weight that agrees."""
    weighted = [w * x for w, x in zip(weights, X, strict=True)]
    sign = sign_of(weighted, election)
    agree = [(x * sign > 0).astype(float) for x in weighted]
    total = np.sum([x * a for x, a in zip(weighted, agree, strict=True)], axis=0)
    divisor = added(agree, weights)
    return total / np.where(divisor == 0, 1, divisor) if normalize else total


def tsv(deltas: Sequence[Matrix], ranks: Sequence[int], weights: Sequence[float], room: int) -> Matrix:
    U, S, V = [], [], []
    for delta, rank, weight in zip(deltas, ranks, weights, strict=True):
        share = rank if sum(ranks) <= room else max(rank * room // sum(ranks), 1)
        P, sigma, Q = svd(delta)
        U.append(P[:, :share])
        S.append(weight * sigma[:share])
        V.append(Q[:, :share])
    return (polar(np.hstack(U)) * np.concatenate(S)) @ polar(np.hstack(V)).T


def iso(X: Matrix) -> Matrix:
    U, S, V = svd(X)
    return S.mean() * U @ V.T


def frame(pool: Pool) -> tuple[Matrix, Matrix]:
    """Singular bases of what all B's and all A's span, √|s| on either side; along each the deltas sum up to ≥ 0."""
    U, _, _ = svd(np.hstack([B * abs(s) ** 0.5 for _, B, s in pool.adapters]))
    _, _, V = svd(np.vstack([A * abs(s) ** 0.5 for A, _, s in pool.adapters]))
    return facing(pool, U, V)


def facing(pool: Pool, U: Matrix, V: Matrix) -> tuple[Matrix, Matrix]:
    total = np.sum(pool.deltas, axis=0)
    return U * np.where((U.T @ total).sum(1) < 0, -1, 1), V * np.where((total @ V).sum(0) < 0, -1, 1)


def by_rule(matrices: Sequence[Matrix], pool: Pool, room: int, options: dict[str, Any]) -> Matrix:
    rule, density = options["rule"], options.get("density", 0.2)
    if rule == "tsv":
        return tsv(matrices, pool.ranks, pool.weights, room)
    if rule == "iso":
        return iso(added(matrices, pool.weights))
    if rule in {"dare", "dare_ties"}:
        matrices = [dropped(M, density, seed) for M, seed in zip(matrices, pool.seeds, strict=True)]
    elif rule == "ties":
        matrices = [trimmed(M, density) for M in matrices]
    if rule.endswith("ties"):
        return peft_ties(matrices, pool.weights, options.get("majority_sign_method", "total"))
    return added(matrices, pool.weights)


def core_space(pool: Pool, options: dict[str, Any]) -> Matrix:
    U, V = frame(pool)
    cores = [U.T @ D @ V for D in pool.deltas]
    return U @ by_rule(cores, pool, min(cores[0].shape), options) @ V.T


def tsv_m(pool: Pool, _: dict[str, Any]) -> Matrix:
    return core_space(pool, {"rule": "tsv"})


def iso_c(pool: Pool, _: dict[str, Any]) -> Matrix:
    return iso(pool.total())


def iso_cts(pool: Pool, options: dict[str, Any]) -> Matrix:
    weighted = [w * D for w, D in zip(pool.weights, pool.deltas, strict=True)]
    U, S, V = svd(pool.total())
    count = len(weighted)
    each = round((len(S) - int(len(S) * options["common_fraction"])) / count)
    common = max(len(S) - each * count, 0)
    U, S, V = U[:, :common], S[:common], V[:, :common]
    parts = [(U, S, V)]
    for D in weighted:
        P, sigma, Qh = np.linalg.svd(D - U @ (U.T @ D), full_matrices=False)
        there = min(each, int((sigma > NULL * np.linalg.norm(D)).sum()))
        parts.append((P[:, :there], sigma[:there], Qh[:there].T))
    left, sizes, right = (np.concatenate([part[i] for part in parts], axis=axis) for i, axis in enumerate((1, 0, 1)))
    return sizes.mean() * polar(left) @ polar(right).T


def knots(pool: Pool, options: dict[str, Any]) -> Matrix:
    U, S, Vh = np.linalg.svd(np.hstack(pool.deltas), full_matrices=False)
    there = 1e-5 * S[0] < S
    # the smallest direction comes first, which masks see
    U, parts = U[:, there][:, ::-1], (S[there, None] * Vh[there])[::-1]
    signs = np.where(parts.sum(1) < 0, -1.0, 1.0)
    split = np.split(parts * signs[:, None], len(pool.deltas), axis=1)
    return (U * signs) @ by_rule(split, pool, 0, options)


def pico(pool: Pool, options: dict[str, Any]) -> Matrix:
    U, V = frame(pool)
    _, S, _ = svd(np.hstack([B * abs(s) ** 0.5 for _, B, s in pool.adapters]))
    calibration = 1 / (1 + (len(pool.deltas) - 1) * S**2 / (S**2).sum())
    cores = [calibration[:, None] * (U.T @ D @ V) for D in pool.deltas]
    merged = U @ by_rule(cores, pool, min(cores[0].shape), options) @ V.T
    norms = [abs(w) * np.linalg.norm(D) for w, D in zip(pool.weights, pool.deltas, strict=True)]
    return merged * (np.mean(norms) / np.linalg.norm(merged)) if merged.any() else merged


def ctm(pool: Pool, options: dict[str, Any]) -> Matrix:
    rank = options["rank"]
    weighted = [w * D for w, D in zip(pool.weights, pool.deltas, strict=True)]
    V = svd(np.vstack(weighted))[2][:, :rank]
    U = svd(np.hstack(weighted))[0][:, :rank]
    for _ in range(options["sweeps"]):
        U = np.linalg.qr(sum(D @ V @ V.T @ D.T for D in weighted) @ U)[0]
        V = np.linalg.qr(sum(D.T @ U @ U.T @ D for D in weighted) @ V)[0]
    if options["sweeps"]:
        inside = [U.T @ D @ V for D in weighted]
        U, V = U @ np.linalg.svd(np.hstack(inside))[0], V @ np.linalg.svd(np.vstack(inside))[2].T
    U, V = facing(pool, U, V)
    inside = [U.T @ D @ V for D in pool.deltas]
    return U @ by_rule(inside, pool, min(inside[0].shape), options) @ V.T


def slerp(pool: Pool, options: dict[str, Any]) -> Matrix:
    one, two = pool.deltas
    t = options.get("t", pool.weights[1] / sum(pool.weights))
    cosine = float((one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two))
    if abs(cosine) > 0.9995:
        return (1 - t) * one + t * two
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * one + math.sin(t * angle) * two) / math.sin(angle)


def karcher(pool: Pool, _: dict[str, Any]) -> Matrix:
    norms = np.array([np.linalg.norm(D) for D in pool.deltas])
    units = [D / norm for D, norm in zip(pool.deltas, norms, strict=True)]
    shares = np.array(pool.weights) / sum(pool.weights)
    mean = added(units, shares)
    mean /= np.linalg.norm(mean)
    for _step in range(500):
        tangent = np.zeros_like(mean)
        for unit, share in zip(units, shares, strict=True):
            cosine = min(1.0, float((unit * mean).sum()))
            angle = math.acos(cosine)
            tangent += share * (angle / math.sin(angle) if angle > 1e-9 else 1.0) * (unit - cosine * mean)
        length = float(np.linalg.norm(tangent))
        if length < 1e-12:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * tangent
        mean /= np.linalg.norm(mean)
    return float((shares * norms).sum()) * mean


def model_stock(pool: Pool, _: dict[str, Any]) -> Matrix:
    signed = [math.copysign(1, w) * D / np.linalg.norm(D) for w, D in zip(pool.weights, pool.deltas, strict=True)]
    count = len(signed)
    pairs = [float((signed[i] * signed[j]).sum()) for i in range(count) for j in range(i)]
    cosine = max(0.0, float(np.mean(pairs))) if pairs else 1.0
    return count * cosine / (1 + (count - 1) * cosine) * pool.total() / count


def _factorwise(pool: Pool, merge: Callable[[list[Matrix], list[float], Sequence[int]], Matrix]) -> Matrix:
    """A' of all A's and B' of all B's, each apart, zeros below the smaller ranks."""
    sizes = [w * s for w, (_, _, s) in zip(pool.weights, pool.adapters, strict=True)]
    A = merge([A for A, _, _ in pool.adapters], [math.copysign(abs(x) ** 0.5, x) for x in sizes], pool.seeds)
    B = merge([B.T for _, B, _ in pool.adapters], [abs(x) ** 0.5 for x in sizes], pool.seeds_b)
    return B.T @ A


def padded(X: Sequence[Matrix]) -> list[Matrix]:
    rank = max(len(x) for x in X)
    return [np.vstack([x, np.zeros((rank - len(x), x.shape[1]))]) for x in X]


def linear_factor(pool: Pool, _: dict[str, Any]) -> Matrix:
    return _factorwise(pool, lambda X, w, _seeds: added(padded(X), w))


def magnitude_prune(pool: Pool, options: dict[str, Any]) -> Matrix:
    density = options["density"]
    return _factorwise(pool, lambda X, w, _seeds: added(padded([trimmed(x, density) for x in X]), w))


def ties(pool: Pool, options: dict[str, Any]) -> Matrix:
    density, election = options["density"], options.get("majority_sign_method", "total")
    return _factorwise(pool, lambda X, w, _seeds: peft_ties(padded([trimmed(x, density) for x in X]), w, election))


def _masked(X: Sequence[Matrix], density: float, seeds: Sequence[int]) -> list[Matrix]:
    return [dropped(x, density, seed) for x, seed in zip(X, seeds, strict=True)]


def dare_linear(pool: Pool, options: dict[str, Any]) -> Matrix:
    density = options["density"]
    return _factorwise(pool, lambda X, w, seeds: added(padded(_masked(X, density, seeds)), w))


def dare_ties(pool: Pool, options: dict[str, Any]) -> Matrix:
    density, election = options["density"], options.get("majority_sign_method", "total")
    return _factorwise(pool, lambda X, w, seeds: peft_ties(padded(_masked(X, density, seeds)), w, election))


def _robust_parts(pool: Pool, options: dict[str, Any]) -> list[tuple[Matrix, Matrix, Matrix]]:
    """Of each adapter its pruned A and Bᵀ with √|s|, and its scales; zeros below the smaller ranks."""
    density, parts = options["density"], []
    for A, B, s in pool.adapters:
        kept_A, kept_B = trimmed(A, density), trimmed(B.T, density)
        after = np.abs(kept_A).sum(1)
        z = np.divide(np.abs(A).sum(1), after, out=np.zeros(len(A)), where=after > 0)
        z = np.where(after > 0, z, z.max() if (after > 0).any() else 1.0)
        z = np.maximum(z, np.sort(z)[min(int(len(z) * 0.8), len(z) - 1)])
        root = abs(s) ** 0.5
        parts.append((kept_A * root, kept_B * math.copysign(root, s), z[:, None]))
    columns = [padded([part[i] for part in parts]) for i in range(3)]
    return list(zip(*columns, strict=True))


def robustmerge(pool: Pool, options: dict[str, Any]) -> Matrix:
    parts = _robust_parts(pool, options)
    A = 2 * np.sum([part[0] for part in parts], axis=0)
    scales = np.sum([part[2] for part in parts], axis=0)
    B = 2 * added([z * B for _, B, z in parts], pool.weights) / scales
    return B.T @ A


def robustmerge_product(pool: Pool, options: dict[str, Any]) -> Matrix:
    parts = _robust_parts(pool, options)
    scales = np.sum([part[2] for part in parts], axis=0)
    return 2 * added([(B * z / scales).T @ A for A, B, z in parts], pool.weights)


def _trims(pool: Pool, options: dict[str, Any]) -> list[Matrix]:
    return [trimmed(D, options["density"]) for D in pool.deltas]


def ties_svd(pool: Pool, options: dict[str, Any]) -> Matrix:
    return peft_ties(_trims(pool, options), pool.weights, options.get("majority_sign_method", "total"))


def ties_mergekit(pool: Pool, options: dict[str, Any]) -> Matrix:
    election, normalize = options.get("majority_sign_method", "total"), options.get("normalize", True)
    return mergekit_ties(_trims(pool, options), pool.weights, election, normalize)


def magnitude_prune_svd(pool: Pool, options: dict[str, Any]) -> Matrix:
    return added(_trims(pool, options), pool.weights)


def dare_linear_svd(pool: Pool, options: dict[str, Any]) -> Matrix:
    return added(_masked(pool.deltas, options["density"], pool.seeds), pool.weights)


def dare_ties_svd(pool: Pool, options: dict[str, Any]) -> Matrix:
    kept = _masked(pool.deltas, options["density"], pool.seeds)
    return peft_ties(kept, pool.weights, options.get("majority_sign_method", "total"))


def _dropped_by_rank(pool: Pool, options: dict[str, Any]) -> list[Matrix]:
    density, epsilon = options["density"], options["epsilon"]
    return [by_row_rank(D, density, epsilon, seed) for D, seed in zip(pool.deltas, pool.seeds, strict=True)]


def della(pool: Pool, options: dict[str, Any]) -> Matrix:
    election, normalize = options.get("majority_sign_method", "total"), options.get("normalize", True)
    return mergekit_ties(_dropped_by_rank(pool, options), pool.weights, election, normalize)


def della_linear(pool: Pool, options: dict[str, Any]) -> Matrix:
    return added(_dropped_by_rank(pool, options), pool.weights)


def _middles(pool: Pool, options: dict[str, Any]) -> list[Matrix]:
    return [middle(D, options["density"], options["gamma"]) for D in pool.deltas]


def breadcrumbs(pool: Pool, options: dict[str, Any]) -> Matrix:
    return added(_middles(pool, options), pool.weights)


def breadcrumbs_ties(pool: Pool, options: dict[str, Any]) -> Matrix:
    election, normalize = options.get("majority_sign_method", "total"), options.get("normalize", False)
    return mergekit_ties(_middles(pool, options), pool.weights, election, normalize)


def sce(pool: Pool, options: dict[str, Any]) -> Matrix:
    X = np.stack([w * D for w, D in zip(pool.weights, pool.deltas, strict=True)])
    if len(X) > 1:
        variance = X.var(axis=0)
        X = X * (variance >= np.sort(variance, axis=None)[-int(options["density"] * variance.size)])
    energy = (X**2).sum((1, 2))
    agree = X * sign_of(list(X), "total") > 0
    shares = agree * (energy / energy.sum())[:, None, None]
    divisor = shares.sum(0)
    return (X * shares).sum(0) / np.where(divisor == 0, 1, divisor)


def weighted_sum(pool: Pool, options: dict[str, Any]) -> Matrix:
    """Of cat, svd and linear."""
    total = pool.total() / (sum(pool.weights) if options.get("normalize") else 1.0)
    return truncated(total, options["rank"]) if "rank" in options else total


def lego(pool: Pool, labels: Sequence[Sequence[int]], norm: str | None, output_reweight: bool) -> Matrix:
    """LoRA-LEGO of clusters that are known: `labels` has one for each component of each adapter."""
    members: dict[int, list[tuple[float, Matrix]]] = {}
    for (A, B, s), weight, own in zip(pool.adapters, pool.weights, labels, strict=True):
        for unit, label in zip(np.hstack([s**0.5 * A, s**0.5 * B.T]), own, strict=True):
            first = members.setdefault(label, [(weight, unit)])[0][1]
            if unit is not first:
                members[label].append((weight, unit * np.sign(unit @ first)))
    d_in = pool.adapters[0][0].shape[1]
    order = {"inf": np.inf, "l2": 2}
    result = np.zeros(pool.deltas[0].shape)
    for cluster in members.values():
        weights = np.array([weight for weight, _ in cluster])
        mean = added([unit for _, unit in cluster], weights / weights.sum())
        if norm is not None:
            sizes = [np.linalg.norm(unit, order[norm]) for _, unit in cluster]
            mean = mean * (weights @ sizes / weights.sum() / np.linalg.norm(mean, order[norm]))
        result += np.outer(mean[d_in:], mean[:d_in])
    rank = np.average(pool.ranks, weights=pool.weights)
    return result * ((rank / len(members)) ** 0.5 if output_reweight else 1.0)


DEFINITIONS: Mapping[str, Callable[[Pool, dict[str, Any]], Matrix]] = {
    **dict.fromkeys(("cat", "svd", "linear"), weighted_sum),
    **{
        method.__name__: method
        for method in (
            core_space, tsv_m, iso_c, iso_cts, knots, pico, ctm, slerp, karcher, model_stock, linear_factor, ties,
            dare_linear, dare_ties, magnitude_prune, robustmerge, robustmerge_product, ties_svd, ties_mergekit,
            dare_linear_svd, dare_ties_svd, magnitude_prune_svd, della, della_linear, breadcrumbs, breadcrumbs_ties,
            sce,
        )
    },
}  # fmt: skip
"""All but LoRA-LEGO, whose clusters are searched for."""
