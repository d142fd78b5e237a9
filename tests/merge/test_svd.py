"""Truncated SVD against a dense SVD."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from artifacts.algebra import core_svd, gram, truncated_factors
from artifacts.errors import RankOutOfRange

PATH = "layers.0.proj"
Write = Callable[..., Path]


def factors(seed: int, r: int, d_in: int = 96, d_out: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)


def truncated(matrix: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 66, 129])
def test_gram_matrices_of_any_size(size: int) -> None:
    X = torch.randn(size, 40, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    torch.testing.assert_close(gram(X), X @ X.T)
    torch.testing.assert_close(gram(X.T, columns=True), X @ X.T)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_it_is_the_best_approximation(write_adapter: Write, merge: Any, dense_delta: Any, rank: int) -> None:
    sources = [write_adapter(f"a{i}", {PATH: factors(i, r)}, lora_alpha=3) for i, r in enumerate((4, 8))]
    exact = dense_delta(sources[0], PATH) - 2 * dense_delta(sources[1], PATH)
    result, report = merge(sources, "svd", weights=[1.0, -2.0], rank=rank)
    best = truncated(exact, rank)
    assert float((result[PATH] - best).norm() / exact.norm()) < 1e-5
    assert report.rank == rank
    totals = report.totals()
    assert totals["relative_error"] == pytest.approx(float((best - exact).norm() / exact.norm()), abs=1e-4)
    assert totals["energy_kept"] == pytest.approx(float(best.norm() ** 2 / exact.norm() ** 2), abs=1e-4)


def test_nearly_equal_adapters(write_adapter: Write, merge: Any, dense_delta: Any) -> None:
    """Collinear components: the Gram matrix alone could not tell them apart in float32."""
    A, B = factors(1, 4)
    noise_A, noise_B = factors(2, 4)
    sources = [
        write_adapter("one", {PATH: (A, B)}),
        write_adapter("two", {PATH: (A + 1e-5 * noise_A, B + 1e-5 * noise_B)}),
        write_adapter("same", {PATH: (A, B)}),
    ]
    exact = sum(dense_delta(source, PATH) for source in sources)
    result, _ = merge(sources, "svd", rank=4)
    assert float((result[PATH] - truncated(exact, 4)).norm() / exact.norm()) < 1e-5


def test_the_difference_of_nearly_equal_adapters(write_adapter: Write, merge: Any, dense_delta: Any) -> None:
    """Gram matrices that still have a Cholesky factor, of which float32 leaves too little: QR has to take over."""
    (A, B), (noise_A, noise_B) = factors(1, 4), factors(2, 4)
    sources = [
        write_adapter("one", {PATH: (A, B)}),
        write_adapter("two", {PATH: (A + 0.01 * noise_A, B + 0.01 * noise_B)}),
    ]
    exact = dense_delta(sources[0], PATH) - dense_delta(sources[1], PATH)
    result, _ = merge(sources, "svd", weights=[1.0, -1.0], rank=4)
    assert float((result[PATH] - truncated(exact, 4)).norm() / exact.norm()) < 2e-4


def test_components_of_very_different_size(write_adapter: Write, merge: Any, dense_delta: Any) -> None:
    A, B = factors(3, 6)
    sizes = torch.tensor([1e3, 1.0, 1e-3, 1e-2, 10, 1e-4])
    source = write_adapter("sizes", {PATH: (A * sizes[:, None], B)})
    exact = dense_delta(source, PATH)
    result, _ = merge([source], "svd", rank=3)
    assert float((result[PATH] - truncated(exact, 3)).norm() / exact.norm()) < 1e-5


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3), rank=st.integers(1, 12))
def test_core_space_never_needs_the_matrix(seed: int, ranks: list[int], rank: int) -> None:
    """More components than dimensions, too: the stack is then rank deficient."""
    parts = [factors(seed + i, r, d_in=7, d_out=6) for i, r in enumerate(ranks)]
    A = torch.cat([part[0] for part in parts]).double()
    B = torch.cat([part[1] for part in parts], 1).double()
    weights = torch.linspace(-1, 2, A.shape[0]).double()
    exact = (B * weights) @ A
    svd = core_svd(A, B, weights, gram(A), gram(B, columns=True))
    low_A, low_B = truncated_factors(A, B, svd, rank)
    difference = low_B @ low_A - truncated(exact, rank)
    assert float(difference.norm()) <= 1e-8 * max(float(exact.norm()), 1e-3)


def test_a_rank_above_the_sum_is_refused(write_adapter: Write, merge: Any) -> None:
    sources = [write_adapter(f"r{i}", {PATH: factors(i, 2)}) for i in range(2)]
    with pytest.raises(RankOutOfRange, match="largest is 4"):
        merge(sources, "svd", rank=5)
