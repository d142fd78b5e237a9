"""Gram matrices by the compiled loops, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts import algebra
from merge.gram import gram
from merge.gram_loops import LEAST_TERMS, MOST_TERMS
from merge.panel import COLUMNS, LANES


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    count=st.integers(1, 3 * COLUMNS + 5),
    size=st.one_of(st.integers(0, 3 * LANES), st.integers(MOST_TERMS - 20, 2 * MOST_TERMS + 20)),
    columns=st.booleans(),
    seed=st.integers(0, 99),
)
def test_inner_products_are_those_of_float64(count: int, size: int, columns: bool, seed: int) -> None:
    shape = (size, count) if columns else (count, size)
    X = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    found = gram(X, columns=columns)
    exact = X.double().T @ X.double() if columns else X.double() @ X.double().T
    assert found.dtype == torch.float64
    assert found.shape == (count, count)
    assert found.is_contiguous()
    torch.testing.assert_close(found, exact, rtol=0, atol=2e-6 * (size + 20))
    assert count < LANES or torch.equal(found, found.T)


@pytest.mark.parametrize("columns", [False, True])
def test_a_block_of_many_is_no_less_exact(columns: bool) -> None:
    """Past 1024 components the sums in float32 are short ones, of which there are several."""
    X = torch.randn(1100, 3 * LEAST_TERMS + 7, generator=torch.Generator().manual_seed(0))
    exact = X.double() @ X.double().T
    found = gram(X.T.contiguous() if columns else X, columns=columns)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)


def test_rows_and_columns_give_the_same_bits() -> None:
    """A result does not depend on which way its factors lie."""
    X = torch.randn(50, 700, generator=torch.Generator().manual_seed(1))
    assert torch.equal(gram(X), gram(X.T.contiguous(), columns=True))


def test_long_sums_are_more_exact_than_in_float32() -> None:
    X = torch.rand(64, 40_000, generator=torch.Generator().manual_seed(2)) + 1
    exact = X.double() @ X.double().T
    error, plain = (float((found - exact).abs().max() / exact.max()) for found in (gram(X), algebra.gram(X)))
    assert error < 2e-6
    assert error <= plain


def test_numbers_that_are_none_are_seen() -> None:
    X = torch.ones(40, 100)
    X[3, 50] = float("nan")
    assert not bool(torch.isfinite(gram(X).diagonal()[3]))
    X[3, 50] = float("inf")
    assert not bool(torch.isfinite(gram(X.T.contiguous(), columns=True).diagonal()[3]))


@pytest.mark.parametrize("X", [torch.ones(20, 30, dtype=torch.float64), torch.ones(30, 20).T], ids=["double", "view"])
def test_others_are_tensor_algebra(X: torch.Tensor) -> None:
    assert torch.equal(gram(X), algebra.gram(X))
