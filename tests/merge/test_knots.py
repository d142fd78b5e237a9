"""KnOTS against the SVD of the dense deltas side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from artifacts.errors import MergeRefused
from merge import rows, rules
from merge.entry_rule import EntryRule


def dense(adapters: list[Any], weights: list[float], density: float, election: Any) -> Tensor:
    deltas = [s * B.double() @ A.double() for A, B, s in adapters]
    U, S, Vh = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
    kept = 1e-5 * S[0] < S
    signs = torch.where(Vh[kept].sum(1) < 0, -1.0, 1.0)
    U, S, Vh = U[:, kept] * signs, S[kept], Vh[kept] * signs[:, None]
    parts = (S[:, None] * Vh).split(deltas[0].shape[1], dim=1)
    trimmed = torch.stack([rules.trimmed(part, density) for part in parts])
    return U @ rules.elected_sum(trimmed, torch.tensor(weights, dtype=torch.float64), election)


@settings(max_examples=12, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    election=st.sampled_from(["total", "frequency"]),
)
def test_ties_on_the_parts(
    seed: int, ranks: list[int], election: str, stack_of: Any, random_adapters: Any, run_method: Any
) -> None:
    adapters = random_adapters(ranks, seed=seed)
    weights = [1.0, -0.5, 2.0][: len(ranks)]
    expected = dense(adapters, weights, 0.3, election)
    result = run_method("knots", stack_of(adapters, weights), density=0.3, majority_sign_method=election)
    assert float((result - expected).norm() / expected.norm()) < 2e-5


def test_the_sum_is_task_arithmetic(stack_of: Any, random_adapters: Any, run_method: Any) -> None:
    stack = stack_of(random_adapters([3, 5]), [1.0, -0.5])
    torch.testing.assert_close(run_method("knots", stack, rule="sum"), run_method("cat", stack), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rule", ["dare", "dare_ties"])
def test_dropping_is_seeded(rule: str, stack_of: Any, random_adapters: Any, run_method: Any) -> None:
    stack = stack_of(random_adapters([3, 5]))
    one, same, other = (run_method("knots", stack, rule=rule, density=0.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_report_measures_a_result_outside_the_span(stack_of: Any, random_adapters: Any) -> None:
    from merge.catalog import METHODS, parse_parameters
    from merge.report import measure_module

    adapters = random_adapters([3, 5])
    stack = stack_of(adapters, [1.0, 0.5])
    merged = METHODS["knots"].load()(stack, parse_parameters("knots", {"rank": 4}), 4)
    report = measure_module("m", merged, padded=0, scale=1.0, norm_factors={})
    exact = sum(w * s * B.double() @ A.double() for w, (A, B, s) in zip((1.0, 0.5), adapters, strict=True))
    result = merged.B.double() @ merged.A.double()
    assert report.relative_error == pytest.approx(float((result - exact).norm() / exact.norm()), rel=1e-4)
    assert report.energy_kept == pytest.approx(float(result.norm() ** 2 / exact.norm() ** 2), rel=1e-4)


def test_parts_in_tiles_are_the_parts(stack_of: Any, random_adapters: Any) -> None:
    """Bit for bit, with more rows and columns than a tile has, and a kept entry on the border of the window."""
    adapters = random_adapters([5, 3], d_out=70, d_in=2500)
    parts = rows.DeltaRows(tuple(A for A, _, _ in adapters), tuple(B.contiguous() for _, B, _ in adapters))
    assert len(list(parts.tiles())) > 2
    weights = torch.tensor([1.0, -0.5], dtype=torch.float64)
    whole = torch.cat([tile.clone() for _, _, tile in parts.tiles(whole_rows=True)], 1)
    expected = rules.elected_sum(whole, weights, "total", rules.trimming(whole, 0.2, parts.entries))
    window = rows.trimming(parts, 0.2)
    assert torch.equal(parts.whole(EntryRule.elected_sum(weights, "total", window)), expected)


@pytest.mark.parametrize("rule", ["sum", "ties", "dare", "dare_ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_are_never_there_together(
    rule: str,
    dtype: torch.dtype,
    stack_of: Any,
    random_adapters: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the rules on whole parts do."""
    from merge.catalog import parse_parameters
    from merge.methods import knots

    stack = stack_of(random_adapters([5, 3, 4], d_out=70, d_in=300), [1.0, -0.5, 2.0], dtype)
    options = parse_parameters("knots", {"rule": rule, "density": 0.3, "seed": 3})
    parts = rows.DeltaRows.of(stack)
    whole = torch.cat([tile.clone() for _, _, tile in parts.tiles(whole_rows=True)], 1)
    if rule.startswith("dare"):
        seeds = rules.seeds(stack, 3)
        whole = torch.stack([rules.dropped(part, 0.3, seed) for part, seed in zip(whole, seeds, strict=True)])
    window = rules.trimming(whole, 0.3, parts.entries) if rule == "ties" else None
    if rule.endswith("ties"):
        expected = rules.elected_sum(whole, stack.owner_weights, "total", window)
    else:
        expected = rules.weighted_sum(whole, stack.owner_weights)
    monkeypatch.setattr(rows, "SORTED", 100)
    monkeypatch.setattr(rows, "SAMPLE", 1 << 12)
    monkeypatch.setattr(rows, "TILE_BYTES", 1)
    found = knots._merged_parts(parts, stack, options)
    assert found.dtype == dtype
    wrong = (found - expected).abs() > 1e-4 * expected.abs().max()
    assert int(wrong.sum()) == 0


@pytest.mark.parametrize("rule", ["sum", "ties", "dare", "dare_ties"])
def test_large_numbers_are_merged_or_refused_in_words(
    rule: str, stack_of: Any, random_adapters: Any, run_method: Any
) -> None:
    pairs = random_adapters([3, 4])
    large = [(A * 3e3, B * 3e3, s) for A, B, s in pairs]
    stack = stack_of(large, [1e6, -5e5])
    found = run_method("knots", stack, rule=rule, density=0.5)
    exact = run_method("knots", stack_of(large, [1e6, -5e5], torch.float64), rule=rule, density=0.5)
    # masks come from the numbers' bytes, which differ with the precision
    if not rule.startswith("dare"):
        assert float((found - exact).norm() / exact.norm()) < 1e-5
    assert bool(found.isfinite().all())
    beyond = [(A * 1e16, B * 1e16, s) for A, B, s in pairs]
    with pytest.raises(MergeRefused, match="overflow"):
        run_method("knots", stack_of(beyond, [1e6, -5e5]), rule=rule, density=0.5)


@pytest.mark.parametrize("k", [1, 2, 40_000, 139_999, 140_000])
def test_the_borders_of_broad_parts(k: int) -> None:
    """Exact for numbers that differ, for ties, for zeros, and where rows and columns are not like the others."""
    plain = torch.randn(40, 3500, generator=torch.Generator().manual_seed(0))
    skewed = plain.clone()
    skewed[::7] *= 100
    skewed[:, 1000:1100] *= 1000
    cases = (plain, plain.round(decimals=1), plain * 0, skewed)
    parts = rows.DeltaRows(cases, tuple(torch.eye(40) for _ in cases))
    assert parts.entries > rows.SORTED
    expected = [[float(case.abs().flatten().sort(descending=True).values[k - 1])] for case in cases]
    found = rows.largest(parts, rows.entries, [[k]] * 4)
    assert found == (expected if k < parts.entries else [[0.0]] * 4)
