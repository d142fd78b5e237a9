"""norm_equalize: the same as scaling the adapters by hand, with any method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge.catalog import METHODS

Write = Callable[..., Path]
PATHS = ("a.proj", "b.proj")


def modules(seed: int, sizes: tuple[float, float]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        path: (torch.randn(3, 12, generator=generator), size * torch.randn(10, 3, generator=generator))
        for path, size in zip(PATHS, sizes, strict=True)
    }


@pytest.fixture
def sources(write_adapter: Write) -> list[Path]:
    sizes = [(1.0, 1.0), (20.0, 1.0), (0.1, 3.0)]
    return [write_adapter(f"s{i}", modules(i, size), lora_alpha=i + 1) for i, size in enumerate(sizes)]


def factors_of(sources: list[Path], dense_delta: Any, mode: str) -> dict[str, list[float]]:
    norms = {path: torch.tensor([float(dense_delta(s, path).norm()) for s in sources]) for path in PATHS}
    if mode == "adapter":
        whole = sum(norm.square() for norm in norms.values()).sqrt()
        norms = dict.fromkeys(PATHS, whole)
    return {path: (norm.median() / norm).tolist() for path, norm in norms.items()}


@pytest.mark.parametrize("mode", ["adapter", "module"])
def test_the_sum_of_scaled_deltas(mode: str, sources: list[Path], merge: Any, dense_delta: Any) -> None:
    result, report = merge(sources, "cat", weights=[1.0, 0.5, 2.0], norm_equalize=mode)
    factors = factors_of(sources, dense_delta, mode)
    for module in report.modules:
        assert module.norm_factors == pytest.approx(factors[module.path], rel=1e-4)
        expected = sum(
            w * f * dense_delta(source, module.path)
            for w, f, source in zip((1.0, 0.5, 2.0), factors[module.path], sources, strict=True)
        )
        torch.testing.assert_close(result[module.path], expected, rtol=1e-4, atol=1e-4)
        assert module.relative_error == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if not row.capabilities.only_adapters])
def test_before_any_method(
    method: str, sources: list[Path], write_adapter: Write, merge: Any, dense_delta: Any
) -> None:
    """The same as merging adapters that were scaled by hand, on B alone: LEGO sees the split, so it is left out."""
    factors = factors_of(sources, dense_delta, "module")
    scaled = []
    for i, source in enumerate(sources):
        tensors = load_file(source / "adapter_model.safetensors")
        for path in PATHS:
            for side in "AB":
                tensors[f"base_model.model.{path}.lora_{side}.weight"] *= factors[path][i] ** 0.5
        copy = write_adapter(f"c{i}", modules(i, (1.0, 1.0)), lora_alpha=i + 1)
        save_file(tensors, copy / "adapter_model.safetensors")
        scaled.append(copy)
    one, _ = merge(sources, method, norm_equalize="module")
    other, _ = merge(scaled, method)
    if "seed" in METHODS[method].options.model_fields and method != "lego":
        return  # masks follow the numbers of an adapter, which differ in the last bit
    for path in PATHS:
        torch.testing.assert_close(one[path], other[path], rtol=1e-3, atol=1e-3)


def test_biases_are_scaled_too(write_adapter: Write, merge: Any, tmp_path: Path, dense_delta: Any) -> None:
    sources = []
    for i in range(2):
        source = write_adapter(f"b{i}", {"proj": modules(i, (1.0 + 3 * i, 1.0))["a.proj"]}, lora_bias=True)
        weights = source / "adapter_model.safetensors"
        save_file({**load_file(weights), "base_model.model.proj.lora_B.bias": torch.ones(10)}, weights)
        sources.append(source)
    merge(sources, "cat", norm_equalize="adapter")
    norms = [float(dense_delta(source, "proj").norm()) for source in sources]
    expected = sum((norms[0] + norms[1]) / 2 / norm for norm in norms)
    bias = load_file(tmp_path / "merged-1" / "adapter_model.safetensors")["base_model.model.proj.lora_B.bias"]
    torch.testing.assert_close(bias, torch.full((10,), expected), rtol=1e-4, atol=0)


def test_a_zero_adapter_stays_zero(write_adapter: Write, merge: Any, dense_delta: Any) -> None:
    zero = {path: (A, B * 0) for path, (A, B) in modules(1, (1.0, 1.0)).items()}
    sources = [write_adapter("one", modules(0, (1.0, 1.0))), write_adapter("zero", zero)]
    result, _ = merge(sources, "cat", norm_equalize="adapter")
    torch.testing.assert_close(result["a.proj"], dense_delta(sources[0], "a.proj"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1e-3, 1e3])
@pytest.mark.parametrize("mode", ["adapter", "module"])
def test_the_common_size_of_the_adapters_plays_no_part(
    mode: str, size: float, write_adapter: Write, merge: Any
) -> None:
    """One among them is zero, and keeps the factor 1."""
    pairs = [modules(0, (size, size)), modules(1, (3 * size, 2 * size)), modules(2, (0.0, 0.0))]
    sources = [write_adapter(f"s{i}", pair) for i, pair in enumerate(pairs)]
    _, report = merge(sources, "cat", norm_equalize=mode)
    for module in report.modules:
        one, two, zero = module.norm_factors
        # the median of two norms is their mean: n₁f₁ = n₂f₂ = (n₁ + n₂)/2
        assert 1 / one + 1 / two == pytest.approx(2, rel=1e-4)
        assert one > 1 > two
        assert zero == 1


def test_adapters_that_are_all_zero_keep_their_size(write_adapter: Write, merge: Any) -> None:
    sources = [write_adapter(f"s{i}", modules(i, (0.0, 0.0))) for i in range(2)]
    _, report = merge(sources, "cat", norm_equalize="adapter")
    assert [module.norm_factors for module in report.modules] == [(1, 1), (1, 1)]


def test_norms_are_those_of_the_numbers_in_the_precision_of_the_merge(write_adapter: Write, merge: Any) -> None:
    """In bfloat16, a sum of many squares would stop to grow."""
    pairs = [{path: (A.bfloat16(), B.bfloat16()) for path, (A, B) in modules(i, (1.0, 2.0)).items()} for i in range(2)]
    sources = [write_adapter(f"s{i}", pair) for i, pair in enumerate(pairs)]
    norms = [sum(float((B.double() @ A.double()).norm() ** 2) for A, B in pair.values()) ** 0.5 for pair in pairs]
    _, report = merge(sources, "cat", norm_equalize="adapter")
    for module in report.modules:
        assert module.norm_factors == pytest.approx([sum(norms) / 2 / norm for norm in norms], rel=1e-6)
