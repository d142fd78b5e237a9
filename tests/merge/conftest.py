"""Small adapters of one or two modules, built from matrices."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from artifacts.adapter import Adapter
from artifacts.base_model import BaseModelRef
from merge.catalog import find_method, parse_parameters
from merge.engine import merge_files
from merge.plan import MergeInput
from merge.report import MergeReport
from merge.stack import Stack

sys.path.insert(0, str(Path(__file__).parent))

Factors = tuple[Tensor, Tensor]
"""(A: (r, d_in), B: (d_out, r))"""


@pytest.fixture
def write_adapter(tmp_path: Path) -> Callable[..., Path]:
    """write_adapter(name, {module: (A, B)}, **config) → a PEFT directory."""

    def write(name: str, modules: Mapping[str, Factors], **config: Any) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        tensors = {}
        for path, (A, B) in modules.items():
            tensors[f"base_model.model.{path}.lora_A.weight"] = A.contiguous()
            tensors[f"base_model.model.{path}.lora_B.weight"] = B.contiguous()
        rank = next(iter(modules.values()))[0].shape[0]
        document = {
            "peft_type": "LORA",
            "base_model_name_or_path": "tiny",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": sorted({path.rsplit(".", 1)[-1] for path in modules}),
            **config,
        }
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        (directory / "adapter_config.json").write_text(json.dumps(document))
        return directory

    return write


@pytest.fixture
def as_input() -> Callable[..., tuple[MergeInput, Path]]:
    """as_input(directory, weight) → what the engine takes."""

    def describe(directory: Path, weight: float = 1.0, **changes: Any) -> tuple[MergeInput, Path]:
        adapter = Adapter.open(directory)
        fields: dict[str, Any] = {
            "id": directory.name,
            "name": directory.name,
            "digest": directory.name,
            "modules": tuple(adapter.modules.values()),
            "method": "lora",
            "mergeable": True,
            "refusal": None,
            "base": BaseModelRef.named("tiny"),
            "weight": weight,
        }
        return MergeInput(**{**fields, **changes}), directory

    return describe


@pytest.fixture
def merge(
    tmp_path: Path, as_input: Callable[..., tuple[MergeInput, Path]]
) -> Callable[..., tuple[dict[str, Tensor], MergeReport]]:
    """merge(directories, method, weights=…, **parameters) → ({module: dense ΔW, float64}, report)."""
    count = 0

    def run(
        directories: Sequence[Path], method: str, weights: Sequence[float] | None = None, **parameters: Any
    ) -> tuple[dict[str, Tensor], MergeReport]:
        nonlocal count
        count += 1
        weights = weights or [1.0] * len(directories)
        inputs = [as_input(path, weight) for path, weight in zip(directories, weights, strict=True)]
        parameters = {"output_dtype": "float32", **parameters}
        out = tmp_path / f"merged-{count}"
        report = merge_files(inputs, method, parse_parameters(method, parameters), out)
        merged = Adapter.open(out)
        assert not list(out.glob("*.partial"))
        return {path: dense(merged, path) for path in merged}, report

    return run


def dense(adapter: Adapter, path: str) -> Tensor:
    factors = adapter[path]
    return factors.scaling * factors.B.double() @ factors.A.double()


@pytest.fixture
def dense_delta() -> Callable[[Path, str], Tensor]:
    """dense_delta(directory, module) → scaling·B·A, float64."""
    return lambda directory, path: dense(Adapter.open(directory), path)


def _stack_of(
    adapters: Sequence[tuple[Tensor, Tensor, float]],
    weights: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    shuffle: int | None = None,
) -> Stack:
    parts = [(A.double(), B.double(), s) for A, B, s in adapters]
    if shuffle is not None:
        generator = torch.Generator().manual_seed(shuffle)
        orders = [torch.randperm(len(A), generator=generator) for A, _, _ in parts]
        parts = [(A[order], B[:, order], s) for (A, B, s), order in zip(parts, orders, strict=True)]
    weights = weights or [1.0] * len(parts)
    sizes = [len(A) for A, _, _ in parts]

    def each(values: Sequence[Any], kind: torch.dtype) -> Tensor:
        return torch.tensor([value for value, size in zip(values, sizes, strict=True) for _ in range(size)], dtype=kind)

    roots = [abs(s) ** 0.5 for _, _, s in parts]
    return Stack(
        torch.cat([A * root for (A, _, _), root in zip(parts, roots, strict=True)]).to(dtype),
        torch.cat([B * math.copysign(root, s) for (_, B, s), root in zip(parts, roots, strict=True)], 1).to(dtype),
        each(range(len(parts)), torch.int64),
        each(weights, torch.float64),
        torch.cat([torch.arange(size) for size in sizes]),
        each([s for _, _, s in parts], torch.float64),
    ).ordered()


@pytest.fixture(scope="session")
def stack_of() -> Callable[..., Stack]:
    """stack_of([(A, B, scaling), …], weights, dtype, shuffle=seed) → the stack of one module."""
    return _stack_of


@pytest.fixture(scope="session")
def random_adapters() -> Callable[..., list[tuple[Tensor, Tensor, float]]]:
    """random_adapters(ranks, d_out, d_in, seed) → [(A, B, scaling), …] that share part of their directions."""

    def draw(
        ranks: Sequence[int], d_out: int = 24, d_in: int = 40, seed: int = 0
    ) -> list[tuple[Tensor, Tensor, float]]:
        generator = torch.Generator().manual_seed(seed)
        shared = torch.randn(max(ranks), d_in, generator=generator), torch.randn(d_out, max(ranks), generator=generator)
        return [
            (
                0.6 * shared[0][:r] + torch.randn(r, d_in, generator=generator),
                0.6 * shared[1][:, :r] + torch.randn(d_out, r, generator=generator),
                (0.5, 2.0, 1.0, 1.5)[i % 4],
            )
            for i, r in enumerate(ranks)
        ]

    return draw


@pytest.fixture(scope="session")
def run_method() -> Callable[..., Tensor]:
    """run_method(name, stack, rank=None, **parameters) → dense ΔW' (float64) of one module."""

    def run(name: str, stack: Stack, rank: int | None = None, **parameters: Any) -> Tensor:
        if rank is not None:
            parameters["rank"] = rank
        merged = find_method(name).load()(stack, parse_parameters(name, parameters), rank or stack.size)
        return merged.B.double() @ merged.A.double()

    return run
