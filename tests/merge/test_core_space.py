"""Core Space, TSV-Merge, Iso-C and Iso-CTS against the same on dense float64 matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge import rules


def dense_frame(adapters: list[Any]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Deltas, U and V from plain SVDs of the stacked factors."""
    A = torch.cat([A.double() * abs(s) ** 0.5 for A, _, s in adapters])
    B = torch.cat([B.double() * abs(s) ** 0.5 for _, B, s in adapters], 1)
    U, sigma_B, _ = torch.linalg.svd(B, full_matrices=False)
    _, sigma_A, Vh = torch.linalg.svd(A, full_matrices=False)
    U, V = U[:, sigma_B > 1e-9 * sigma_B[0]], Vh[sigma_A > 1e-9 * sigma_A[0]].T
    return [s * B.double() @ A.double() for A, B, s in adapters], U, V


def polar(X: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh


def near(one: Tensor, other: Tensor, tolerance: float = 2e-5) -> bool:
    return float((one - other).norm()) <= tolerance * float(other.norm())


@settings(max_examples=12, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    rule=st.sampled_from(["sum", "ties", "iso"]),
)
def test_rules_in_the_core(
    seed: int, ranks: list[int], rule: str, stack_of: Any, random_adapters: Any, run_method: Any
) -> None:
    adapters = random_adapters(ranks, seed=seed)
    weights = [1.0, -0.5, 2.0][: len(ranks)]
    deltas, U, V = dense_frame(adapters)
    cores = torch.stack([U.T @ delta @ V for delta in deltas])
    by_weight = torch.tensor(weights, dtype=torch.float64)
    if rule == "ties":
        kept = torch.stack([rules.trimmed(core, 0.4) for core in cores])
        merged = rules.elected_sum(kept, by_weight, "total")
    else:
        merged = rules.weighted_sum(cores, by_weight)
    if rule == "iso":
        P, S, Qh = torch.linalg.svd(merged)
        merged = S.mean() * P @ Qh
    result = run_method("core_space", stack_of(adapters, weights), rule=rule, density=0.4)
    # sign votes that are zero to rounding may fall to either side
    assert near(result, U @ merged @ V.T, 2e-5)
    if rule == "sum":
        assert near(result, sum(w * d for w, d in zip(weights, deltas, strict=True)))


def test_the_frame_loses_nothing(stack_of: Any, random_adapters: Any) -> None:
    from merge.core import CoreFrame

    adapters = random_adapters([3, 5])
    stack = stack_of(adapters)
    frame = CoreFrame.of(stack)
    left, right = stack.B.double() @ frame.left, stack.A.T.double() @ frame.right
    torch.testing.assert_close(left.T @ left, torch.eye(8, dtype=torch.float64), atol=1e-5, rtol=0)
    deltas = [s * B.double() @ A.double() for A, B, s in adapters]
    for (owner, _), core in zip(stack.members, frame.cores(), strict=True):
        assert near(left @ core @ right.T, deltas[owner])


@settings(max_examples=8, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000), ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_tsv_is_that_of_the_whole_matrices(
    seed: int, ranks: list[int], stack_of: Any, random_adapters: Any, run_method: Any
) -> None:
    """All rᵢ triplets of every delta, orthogonalised in full space: the core version is the same matrix."""
    adapters = random_adapters(ranks, seed=seed)
    weights = [1.0, -0.5, 2.0][: len(ranks)]
    U, S, V = [], [], []
    for (A, B, s), weight in zip(adapters, weights, strict=True):
        P, sigma, Qh = torch.linalg.svd(s * B.double() @ A.double(), full_matrices=False)
        r = len(A)
        U.append(P[:, :r])
        S.append(weight * sigma[:r])
        V.append(Qh[:r].T)
    expected = (polar(torch.cat(U, 1)) * torch.cat(S)) @ polar(torch.cat(V, 1)).T
    stack = stack_of(adapters, weights)
    assert near(run_method("tsv_m", stack), expected, 1e-4)
    assert torch.equal(run_method("tsv_m", stack), run_method("core_space", stack, rule="tsv"))


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_directions_that_are_rounding_get_no_weight_in_double_precision(
    method: str, stack_of: Any, run_method: Any
) -> None:
    """The same deltas, sizes over five decades, from as many components as they have directions, and from more."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(0, -5, 6, dtype=torch.float64)[:, None]
    whole, redundant = [], []
    for _ in range(2):
        A = sizes * torch.linalg.qr(torch.randn(40, 6, dtype=torch.float64, generator=generator)).Q.T
        mix = torch.randn(9, 6, dtype=torch.float64, generator=generator)
        B = torch.randn(24, 9, dtype=torch.float64, generator=generator)
        whole.append((A, B @ mix, 1.0))
        redundant.append((mix @ A, B, 1.0))
    expected = run_method(method, stack_of(whole, dtype=torch.float64))
    assert near(run_method(method, stack_of(redundant, dtype=torch.float64)), expected, 1e-4)
    if method == "iso_c":
        U, S, Vh = torch.linalg.svd(sum(B @ A for A, B, _ in whole))
        assert near(expected, S[:12].mean() * U[:, :12] @ Vh[:12], 1e-4)


class TestOnWholeMatricesTheyMakeNoise:
    def test_iso_leaves_the_subspace_of_the_adapters(
        self, stack_of: Any, random_adapters: Any, run_method: Any
    ) -> None:
        adapters = random_adapters([4, 4], d_out=48, d_in=64)
        deltas, U, _ = dense_frame(adapters)
        P, S, Qh = torch.linalg.svd(sum(deltas), full_matrices=False)
        full = S.mean() * P @ Qh
        assert torch.linalg.matrix_rank(full) == 48
        outside = full - U @ (U.T @ full)
        assert float(outside.norm() ** 2 / full.norm() ** 2) > 0.8
        ours = run_method("iso_c", stack_of(adapters))
        assert torch.linalg.matrix_rank(ours, rtol=1e-4) == 8
        assert float((ours - U @ (U.T @ ours)).norm() / ours.norm()) < 1e-5

    def test_tsv_is_stable_in_the_core_only(self, stack_of: Any, random_adapters: Any, run_method: Any) -> None:
        """A share of d/N triplets of a low-rank matrix holds null vectors, which noise of 1e-7 turns."""

        def full_space(deltas: list[Tensor]) -> Tensor:
            share = 24 // len(deltas)
            parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
            U = polar(torch.cat([P[:, :share] for P, _, _ in parts], 1))
            V = polar(torch.cat([Qh[:share].T for _, _, Qh in parts], 1))
            return (U * torch.cat([S[:share] for _, S, _ in parts])) @ V.T

        adapters = random_adapters([4, 4])
        deltas = [s * B.double() @ A.double() for A, B, s in adapters]
        generator = torch.Generator().manual_seed(1)
        noisy = [
            delta + 1e-7 * delta.norm() / 31 * torch.randn(24, 40, generator=generator, dtype=torch.float64)
            for delta in deltas
        ]
        one, other = full_space(deltas), full_space(noisy)
        assert float((one - other).norm() / one.norm()) > 0.1
        moved = [(A + 1e-7 * torch.randn(A.shape, generator=generator), B, s) for A, B, s in adapters]
        assert near(run_method("tsv_m", stack_of(moved)), run_method("tsv_m", stack_of(adapters)), 1e-5)


def test_iso_c_is_isotropic(stack_of: Any, random_adapters: Any, run_method: Any) -> None:
    adapters = random_adapters([3, 5])
    exact = torch.linalg.svdvals(sum(s * B.double() @ A.double() for A, B, s in adapters))[:8]
    result = torch.linalg.svdvals(run_method("iso_c", stack_of(adapters)))
    torch.testing.assert_close(result[:8], exact.mean().expand(8), rtol=1e-5, atol=0)
    assert float(result[8]) < 1e-4


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.8, 1.0])
def test_iso_cts_against_dense_cores(fraction: float, stack_of: Any, random_adapters: Any, run_method: Any) -> None:
    adapters = random_adapters([3, 5, 4])
    deltas, U, V = dense_frame(adapters)
    cores = [U.T @ delta @ V for delta in deltas]
    P, S, Qh = torch.linalg.svd(sum(cores))
    each = round((12 - int(12 * fraction)) / 3)
    common = 12 - 3 * each
    P, S, Qh = P[:, :common], S[:common], Qh[:common]
    parts = [(P, S, Qh)]
    for core in cores:
        own = torch.linalg.svd(core - P @ P.T @ core)
        there = min(each, int((own[1] > 1e-6).sum()))
        parts.append((own[0][:, :there], own[1][:there], own[2][:there]))
    mean = torch.cat([part[1] for part in parts]).mean()
    merged = mean * polar(torch.cat([part[0] for part in parts], 1)) @ polar(torch.cat([p[2].T for p in parts], 1)).T
    assert near(run_method("iso_cts", stack_of(adapters), common_fraction=fraction), U @ merged @ V.T, 1e-4)


def test_dare_is_seeded_and_unbiased(stack_of: Any, random_adapters: Any, run_method: Any) -> None:
    adapters = random_adapters([3, 3])
    stack = stack_of(adapters)
    one = run_method("core_space", stack, rule="dare", density=0.7, seed=1)
    assert torch.equal(one, run_method("core_space", stack, rule="dare", density=0.7, seed=1))
    draws = [run_method("core_space", stack, rule="dare", density=0.7, seed=seed) for seed in range(200)]
    assert not torch.equal(one, draws[0])
    exact = run_method("core_space", stack, rule="sum")
    mean = sum(draws) / len(draws)
    assert float((mean - exact).norm() / exact.norm()) < 0.1


def test_of_equal_singular_values_those_of_the_sum_stay(stack_of: Any, random_adapters: Any, run_method: Any) -> None:
    """Truncated, Iso-C is the leading directions of the sum, and Iso-CTS begins with the common ones."""
    adapters = random_adapters([4, 4])
    U, S, Vh = torch.linalg.svd(sum(s * B.double() @ A.double() for A, B, s in adapters))
    expected = S[:8].mean() * U[:, :3] @ Vh[:3]
    assert near(run_method("iso_c", stack_of(adapters), rank=3), expected)
    # common directions alone: no specific one is taken
    assert near(run_method("iso_cts", stack_of(adapters), rank=3, common_fraction=1.0), expected)


def test_an_adapter_twice_leaves_no_more_directions(stack_of: Any, random_adapters: Any, run_method: Any) -> None:
    """Neither U nor V has as many directions as there are triplets, of which each brings its half."""
    [(A, B, s)] = random_adapters([4])
    twice = stack_of([(A, B, s), (A, B, s)])
    delta = s * B.double() @ A.double()
    P, S, Qh = torch.linalg.svd(delta, full_matrices=False)
    # the polar factor of [P, P] is [P, P]/√2
    assert near(run_method("tsv_m", twice), (P[:, :2] * S[:2]) @ Qh[:2])
    assert near(run_method("tsv_m", twice, rank=1), (P[:, :1] * S[:1]) @ Qh[:1])
    assert near(run_method("iso_c", twice), 2 * S[:4].mean() * P[:, :4] @ Qh[:4])


def test_any_basis_gives_the_same(stack_of: Any, random_adapters: Any) -> None:
    from merge import spectral
    from merge.core import CoreFrame

    stack = stack_of(random_adapters([3, 5]), [1.0, -0.5])
    results = []
    for singular in ("both", "left", "none"):
        frame = CoreFrame.of(stack, singular)
        core = spectral.separated(frame.cores(), stack.ranks, stack.owner_weights, frame.cutoff)
        merged = frame.merged(core, 5)
        results.append(merged.B.double() @ merged.A.double())
    assert near(results[1], results[0]) and near(results[2], results[0])
    first = spectral.separated(frame.cores(), stack.ranks, stack.owner_weights, frame.cutoff, 3)
    assert len(first.S) == 3
    assert near(first.S, core.S[:3], 1e-12)
    assert near((first.U * first.S) @ first.V.T, (core.U[:, :3] * core.S[:3]) @ core.V[:, :3].T, 1e-12)
    weighted = CoreFrame.of(stack, "none")
    U, S, V = weighted.weighted_sum()
    assert near((U * S) @ V.T, rules.weighted_sum(weighted.cores(), stack.owner_weights), 1e-12)
