"""Tiny random adapters, a runner of command lines, and one real service for all tests that need one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app.cli import run
from app.server_process import ServerProcess

D_IN, D_OUT = 12, 10
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


@dataclass(frozen=True)
class Result:
    """How a command line ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run one command line in this process."""

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def write_adapter(
    folder: Path, seed: int, rank: int = 3, alpha: float = 6.0, modules: tuple[str, ...] = MODULES
) -> Path:
    """A PEFT directory of random float32 factors; returns it."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, D_IN, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(D_OUT, rank, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "acme/tiny",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture
def adapters(tmp_path: Path) -> tuple[Path, Path]:
    """Two adapters of one base model, of ranks 3 and 2."""
    return write_adapter(tmp_path / "first", 1), write_adapter(tmp_path / "second", 2, rank=2, alpha=2.0)


@pytest.fixture(scope="session")
def model_roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, model_roots: Path) -> Iterator[ServerProcess]:
    """`rankwise serve` in a process of its own."""
    folder = tmp_path_factory.mktemp("service")
    settings = {"MODEL_ROOTS": str(model_roots), "DEVICES": "cpu:1"}
    with ServerProcess(folder / "data", settings, folder / "server.log") as server:
        yield server


@pytest.fixture
def remote(service: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> str:
    """The service as the one that commands talk to; gives its address."""
    monkeypatch.setenv("RANKWISE_SERVER", service.url)
    return service.url
