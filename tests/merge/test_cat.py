"""Concatenation is the exact weighted sum."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts.errors import RequestInvalid
from merge.catalog import parse_parameters

PATH = "layers.0.proj"
Write = Callable[..., Path]


def factors(seed: int, r: int, d_in: int = 40, d_out: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)


def test_the_weighted_sum(write_adapter: Write, merge: Any, dense_delta: Any) -> None:
    first = write_adapter("first", {PATH: factors(1, 3)}, lora_alpha=5)
    second = write_adapter("second", {PATH: factors(2, 6)}, lora_alpha=2, use_rslora=True)
    result, report = merge([first, second], "cat", weights=[2.0, -0.5], scale=3.0)
    exact = 3 * (2 * dense_delta(first, PATH) - 0.5 * dense_delta(second, PATH))
    torch.testing.assert_close(result[PATH], exact, rtol=1e-5, atol=1e-5)
    assert report.rank == 9
    totals = report.totals()
    assert totals["relative_error"] == 0.0
    assert totals["energy_kept"] == 1.0


def test_normalize_divides_by_the_sum_of_weights(write_adapter: Write, merge: Any, dense_delta: Any) -> None:
    sources = [write_adapter(f"n{i}", {PATH: factors(i, 2)}) for i in range(2)]
    result, report = merge(sources, "cat", weights=[1.0, 3.0], normalize=True)
    exact = 0.25 * dense_delta(sources[0], PATH) + 0.75 * dense_delta(sources[1], PATH)
    torch.testing.assert_close(result[PATH], exact, rtol=1e-5, atol=1e-5)
    assert [item["effective_weight"] for item in report.adapters] == [0.25, 0.75]


def test_interference_is_the_cosine_of_the_deltas(write_adapter: Write, merge: Any, dense_delta: Any) -> None:
    sources = [write_adapter(f"c{i}", {PATH: factors(i, 2), "layers.1.proj": factors(9 + i, 2)}) for i in range(2)]
    _, report = merge(sources, "cat")
    one, two = (torch.cat([dense_delta(s, PATH).flatten(), dense_delta(s, "layers.1.proj").flatten()]) for s in sources)
    cosine = float(one @ two / one.norm() / two.norm())
    table = report.totals()["interference"]
    assert table[0][1] == pytest.approx(cosine, abs=1e-5)
    assert table[0][0] == pytest.approx(1.0)


def test_there_is_no_rank_to_choose() -> None:
    with pytest.raises(RequestInvalid) as caught:
        parse_parameters("cat", {"rank": 4})
    assert caught.value.errors[0].pointer == "/parameters/rank"
