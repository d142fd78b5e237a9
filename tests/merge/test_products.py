"""Products of wide factors with small matrices: against float64, and the bits of a part are those of the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge.panel import COLUMNS, ROWS
from merge.products import of_columns, of_rows, same_prefixes


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    components=st.integers(1, 40),
    rank=st.integers(0, COLUMNS + 9),
    side=st.integers(1, 3 * COLUMNS + 5),
    seed=st.integers(0, 99),
)
def test_products_are_those_of_float64(components: int, rank: int, side: int, seed: int) -> None:
    A, C = drawn(seed, components, side), drawn(seed + 1, rank, components).double()
    exact = C @ A.double()
    for found in (of_rows(C, A), of_columns(A.T.contiguous(), C.T).T):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6 * components)
    part = max(rank - ROWS - 1, 0)
    assert torch.equal(of_rows(C[:part], A), of_rows(C, A)[:part])
    B = A.T.contiguous()
    assert torch.equal(of_columns(B, C[:part].T), of_columns(B, C.T)[:, :part])


def test_a_number_that_is_none_stays_in_its_column() -> None:
    A, C = drawn(1, 5, 70), drawn(2, 3, 5)
    A[2, 66], A[1, 3] = float("nan"), float("inf")
    for found in (of_rows(C, A), of_columns(A.T.contiguous(), C.T).T):
        finite = torch.isfinite(found).all(0)
        assert (~finite).nonzero()[:, 0].tolist() == [3, 66]


@pytest.mark.parametrize("A", [drawn(3, 6, 9).double(), drawn(3, 6, 18)[:, ::2]], ids=["double", "view"])
def test_others_are_tensor_algebra(A: torch.Tensor) -> None:
    C = drawn(4, 2, 6).double()
    assert not same_prefixes(A)
    assert torch.equal(of_rows(C, A), C.to(A.dtype) @ A)
    assert torch.equal(of_columns(A.T, C.T), A.T @ C.T.to(A.dtype))
