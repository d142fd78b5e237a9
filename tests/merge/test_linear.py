"""Task arithmetic on deltas: exact by default, truncated on request, and biases summed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PATH = "layers.0.proj"
Write = Callable[..., Path]


def factors(seed: int, r: int = 3, d_in: int = 40, d_out: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)


def test_it_has_no_cross_terms(write_adapter: Write, merge: Any, dense_delta: Any) -> None:
    sources = [write_adapter(f"a{i}", {PATH: factors(i)}) for i in range(2)]
    result, report = merge(sources, "linear", weights=[1.0, 0.5], scale=0.8)
    exact = 0.8 * (dense_delta(sources[0], PATH) + 0.5 * dense_delta(sources[1], PATH))
    torch.testing.assert_close(result[PATH], exact, rtol=1e-5, atol=1e-5)
    assert report.rank == 6
    A, B = ([factors(i)[side].double() for i in range(2)] for side in (0, 1))
    by_factors = (B[0] + 0.5**0.5 * B[1]) @ (A[0] + 0.5**0.5 * A[1]) * 0.8
    assert float((by_factors - exact).norm() / exact.norm()) > 0.3


def test_a_rank_truncates_like_svd(write_adapter: Write, merge: Any) -> None:
    sources = [write_adapter(f"a{i}", {PATH: factors(i)}) for i in range(2)]
    linear, report = merge(sources, "linear", rank=4)
    svd, _ = merge(sources, "svd", rank=4)
    assert report.rank == 4
    torch.testing.assert_close(linear[PATH], svd[PATH])


def test_biases_of_lora_b_are_summed(write_adapter: Write, merge: Any, tmp_path: Path) -> None:
    sources = []
    for i, alpha in enumerate((6.0, 1.5)):
        source = write_adapter(f"b{i}", {PATH: factors(i)}, lora_alpha=alpha, lora_bias=True)
        weights = source / "adapter_model.safetensors"
        bias = {f"base_model.model.{PATH}.lora_B.bias": torch.full((24,), 1.0 + i)}
        save_file({**load_file(weights), **bias}, weights)
        sources.append(source)
    for method in ("linear", "cat"):
        merge(sources, method, weights=[1.0, -2.0])
    for out in (tmp_path / "merged-1", tmp_path / "merged-2"):
        bias = load_file(out / "adapter_model.safetensors")[f"base_model.model.{PATH}.lora_B.bias"]
        # scalings 6/3 and 1.5/3, weights 1 and −2, biases 1 and 2
        torch.testing.assert_close(bias, torch.full((24,), 2.0 * 1 - 2 * 0.5 * 2))
