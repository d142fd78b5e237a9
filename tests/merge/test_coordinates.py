"""Energies of a result in terms of its components, against those of the matrices themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from artifacts.algebra import gram
from merge.coordinates import Coordinates, Diagonal, OfColumns, Product

SIZE = 7


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 10_000), st.integers(1, SIZE + 2), st.sampled_from([0.0, 1e-9, 1e-5, 1e-2, 1.0]), st.booleans())
def test_energies_are_those_of_the_matrices(seed: int, rank: int, away: float, diagonal: bool) -> None:
    """A result that is `away` from the exact sum, in its components or beside them."""
    A, B, weights = drawn(seed, SIZE, 12), drawn(seed + 1, 9, SIZE), drawn(seed + 2, SIZE)
    K: Coordinates
    if diagonal:
        K = Diagonal(weights + away * drawn(seed + 3, SIZE))
    else:
        rest = away * drawn(seed + 3, SIZE, rank)
        K = Product(
            torch.cat([torch.diag(weights), rest], 1),
            torch.cat([torch.eye(SIZE, dtype=torch.float64), drawn(seed + 4, rank, SIZE)]),
        )
    exact, result = (B * weights) @ A, B @ K.dense() @ A
    energy = float(exact.square().sum())
    kept, error = K.measured(gram(A), gram(B, columns=True), weights, energy)
    assert kept == pytest.approx(float(result.square().sum()), rel=1e-10)
    assert error == pytest.approx(float((result - exact).square().sum()), rel=1e-6, abs=1e-25 * energy)


@given(st.integers(0, 10_000), st.integers(1, SIZE + 2))
def test_a_side_that_is_not_of_the_components_is_known_by_its_inner_products(seed: int, rank: int) -> None:
    A, B, weights = drawn(seed, SIZE, 12), drawn(seed + 1, 9, SIZE), drawn(seed + 2, SIZE)
    left, of_its_own = drawn(seed + 3, SIZE, rank), drawn(seed + 4, rank, 12)
    K = OfColumns(left, of_its_own @ of_its_own.T, of_its_own @ A.T)
    exact, result = (B * weights) @ A, B @ left @ of_its_own
    kept, error = K.measured(gram(A), gram(B, columns=True), weights, float(exact.square().sum()))
    assert kept == pytest.approx(float(result.square().sum()), rel=1e-10)
    assert error == pytest.approx(float((result - exact).square().sum()), rel=1e-9)


def test_nothing_is_as_far_from_the_sum_as_the_sum_is_large() -> None:
    A, B, weights = drawn(1, SIZE, 12), drawn(2, 9, SIZE), drawn(3, SIZE)
    energy = float(((B * weights) @ A).square().sum())
    nothing = torch.zeros(SIZE, dtype=torch.float64)
    for K in (Diagonal(nothing), Product(nothing[:, None], nothing[None])):
        kept, error = K.measured(gram(A), gram(B, columns=True), weights, energy)
        assert (kept, error) == (0.0, pytest.approx(energy))
