"""Pico against dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from merge.catalog import find_method, parse_parameters


def test_against_dense_matrices(stack_of: Any, random_adapters: Any, run_method: Any) -> None:
    adapters, weights = random_adapters([3, 5, 4]), [1.0, 0.5, 2.0]
    folded = [B.double() * s**0.5 for _, B, s in adapters]
    U, S, _ = torch.linalg.svd(torch.cat(folded, 1), full_matrices=False)
    share = S.square() / S.square().sum()
    change = (U * (1 / (1 + 2 * share) - 1)) @ U.T
    merged, norms = torch.zeros(24, 40, dtype=torch.float64), []
    for (A, B, s), weight in zip(adapters, weights, strict=True):
        calibrated = B.double() + change @ B.double()
        merged += weight * s * calibrated @ A.double()
        norms.append(weight * float((s * B.double() @ A.double()).norm()))
    expected = merged * (sum(norms) / 3 / float(merged.norm()))
    stack = stack_of(adapters, weights)
    torch.testing.assert_close(run_method("pico", stack), expected, rtol=1e-4, atol=1e-4)
    found = find_method("pico").load()(stack, parse_parameters("pico", {}), 12).figures
    gain = sum(norms) / 3 / float(merged.norm())
    assert found == {"largest_share": pytest.approx(float(share.max())), "gain": pytest.approx(gain, rel=1e-5)}


@pytest.mark.parametrize("rule", ["sum", "ties", "tsv"])
def test_the_norm_is_the_mean_of_the_deltas(rule: str, stack_of: Any, random_adapters: Any, run_method: Any) -> None:
    adapters = random_adapters([3, 5])
    mean = sum(float((s * B.double() @ A.double()).norm()) for A, B, s in adapters) / 2
    assert float(run_method("pico", stack_of(adapters), rule=rule).norm()) == pytest.approx(mean, rel=1e-4)


def test_shared_directions_lose_weight(stack_of: Any, run_method: Any) -> None:
    """Two adapters write to e₁ both and each to a direction of its own: the share of e₁ falls."""
    A = torch.eye(4)
    one = (A[:2], torch.eye(5)[:, [0, 1]], 1.0)
    two = (A[2:], torch.eye(5)[:, [0, 2]], 1.0)
    stack = stack_of([one, two])
    exact, calibrated = run_method("cat", stack), run_method("pico", stack)
    shared = [float(delta[0].norm() / delta.norm()) for delta in (exact, calibrated)]
    assert shared[1] < shared[0] - 0.05
