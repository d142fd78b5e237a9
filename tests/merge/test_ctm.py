"""Compress then merge: what its outline promises."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from merge.catalog import find_method, parse_parameters
from merge.methods.ctm import shared_subspaces


def test_the_rank_holds_by_construction(stack_of: Any, random_adapters: Any, run_method: Any) -> None:
    stack = stack_of(random_adapters([3, 5, 4]))
    for rule in ("sum", "ties", "dare", "tsv", "iso"):
        result = run_method("ctm", stack, rank=4, rule=rule, density=0.5)
        assert torch.linalg.matrix_rank(result, rtol=1e-4) <= 4


def test_with_room_for_all_nothing_is_lost(stack_of: Any, random_adapters: Any, run_method: Any) -> None:
    stack = stack_of(random_adapters([3, 5]), [1.0, -0.5])
    result = run_method("ctm", stack, rank=8)
    torch.testing.assert_close(result, run_method("cat", stack), rtol=1e-4, atol=1e-3)


def test_the_sum_is_the_projected_sum(stack_of: Any, random_adapters: Any, run_method: Any) -> None:
    """Against dense subspaces from the same objective, without sweeps: leading directions of either side."""
    adapters = random_adapters([3, 5])
    deltas = torch.stack([s * B.double() @ A.double() for A, B, s in adapters])
    U = torch.linalg.svd(torch.cat(list(deltas), 1), full_matrices=False)[0][:, :4]
    V = torch.linalg.svd(torch.cat(list(deltas), 0), full_matrices=False)[2][:4].T
    expected = U @ U.T @ deltas.sum(0) @ V @ V.T
    stack = stack_of(adapters)
    result = run_method("ctm", stack, rank=4, sweeps=0)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    share = float((U.T @ deltas @ V).square().sum() / deltas.square().sum())
    found = find_method("ctm").load()(stack, parse_parameters("ctm", {"rank": 4, "sweeps": 0}), 4)
    assert found.figures == {"energy_in_subspaces": pytest.approx(share, rel=1e-5)}
    nothing = stack_of([(A, B * 0, s) for A, B, s in adapters])
    assert find_method("ctm").load()(nothing, parse_parameters("ctm", {}), 4).figures == {"energy_in_subspaces": 1.0}


def test_sweeps_never_lose_energy() -> None:
    cores = torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    held = []
    for sweeps in (0, 1, 2, 5, 500):
        U, V = shared_subspaces(cores, torch.eye(8, dtype=torch.float64).expand(3, 8, 8), 3, sweeps)
        torch.testing.assert_close(U.T @ U, torch.eye(3, dtype=torch.float64))
        held.append(float((U.T @ cores @ V).square().sum()))
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(held))
    assert held[-1] > held[0] * 1.001
    # settled: the best U for this V, and the best V for this U, hold no more
    best_U = torch.linalg.svdvals(torch.cat(list(cores @ V), 1))[:3].square().sum()
    best_V = torch.linalg.svdvals(torch.cat(list(U.T @ cores), 0))[:3].square().sum()
    assert float(best_U) == pytest.approx(held[-1], rel=1e-6)
    assert float(best_V) == pytest.approx(held[-1], rel=1e-6)
