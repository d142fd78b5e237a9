"""Small adapters of one or two modules, built from matrices."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor

from artifacts.adapter import Adapter
from artifacts.base_model import BaseModelRef
from merge.catalog import parse_parameters
from merge.engine import merge_files
from merge.plan import MergeInput
from merge.report import MergeReport

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
