"""The numbers of what is written: rounding as torch rounds, ranks cut as the singular values allow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from artifacts.adapter import TORCH_DTYPES
from artifacts.float_codes import decode, encode
from artifacts.pair_numbers import cut

BITS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64)


@given(BITS)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_numbers_are_rounded_as_torch_rounds_them(dtype: str, bits: list[int]) -> None:
    numbers = np.array(bits, np.uint32).view(np.float32)
    expected = torch.from_numpy(numbers.copy()).to(TORCH_DTYPES[dtype])
    found = torch.frombuffer(bytearray(encode(numbers, dtype)), dtype=TORCH_DTYPES[dtype])
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[~found.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F8_E5M2"])
def test_every_code_is_the_number_that_torch_says(dtype: str) -> None:
    codes = np.arange(65536, dtype=np.uint16).tobytes() if dtype in ("BF16", "F16") else bytes(range(256))
    expected = torch.frombuffer(bytearray(codes), dtype=TORCH_DTYPES[dtype]).float().numpy()
    np.testing.assert_array_equal(decode(codes, dtype), expected)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32))
def test_a_cut_loses_exactly_the_singular_values_that_it_drops(
    d_out: int, d_in: int, r: int, rank: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    A, B = random.standard_normal((r, d_in)), random.standard_normal((d_out, r))
    new_a, new_b = cut(A, B, 0.7, rank)
    assert (new_a.shape, new_b.shape) == ((rank, d_in), (d_out, rank))
    sigma = np.linalg.svd(0.7 * B @ A, compute_uv=False)
    lost = np.linalg.norm(0.7 * B @ A - new_b @ new_a)
    assert lost == pytest.approx(np.linalg.norm(sigma[rank:]), abs=1e-9)
