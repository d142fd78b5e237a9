"""MLX adapters: transposed factors, and a scaling that only the file beside them tells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from artifacts.adapter import Adapter
from artifacts.errors import ConfigRefused, FileBroken, FormatUnknown
from artifacts.formats.peft import PeftWriter
from artifacts.formats.writing import subject_of
from artifacts.intake import IntakeLimits, inspect, receive
from artifacts.pair_numbers import factors
from artifacts.safetensors_header import read_header

PATH = "model.layers.3.self_attn.q_proj"
CONFIG = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 5, "scale": 20.0, "dropout": 0.0}}

Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """folder(tensors, config) → the directory as mlx-lm writes it."""

    def make(tensors: dict[str, torch.Tensor], config: Any = CONFIG) -> Path:
        save_file(tensors, str(tmp_path / "adapters.safetensors"))
        if config is not None:
            (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def factors_of(d_in: int = 7, d_out: int = 6, rank: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"{PATH}.lora_a": torch.randn(d_in, rank), f"{PATH}.lora_b": torch.randn(rank, d_out)}


@pytest.mark.parametrize("sides", [(7, 6), (5, 5)])  # of (5, 5) the shapes do not show what is transposed
def test_delta_is_scale_times_what_the_layer_adds(folder: Folder, tmp_path: Path, sides: tuple[int, int]) -> None:
    tensors = factors_of(*sides)
    adapter = Adapter.open(folder(tensors))
    found, (module,) = adapter[PATH], adapter.modules.values()
    x = torch.randn(2, sides[0])
    wanted = 20.0 * ((x @ tensors[f"{PATH}.lora_a"]) @ tensors[f"{PATH}.lora_b"])
    torch.testing.assert_close(x @ (found.scaling * found.B @ found.A).T, wanted)
    assert (module.path, module.rank, module.alpha, module.transposed) == (PATH, 5, 100.0, True)
    infos = read_header(tmp_path / "adapters.safetensors").tensors
    written = factors(module, lambda key: (infos[key], tensors[key].numpy().tobytes()))  # the way of downloads
    assert all((there == here.numpy()).all() for there, here in zip(written, (found.A, found.B), strict=True))


def test_an_upload_is_written_as_peft(folder: Folder, tmp_path: Path) -> None:
    directory = folder(factors_of())
    upload = [(path.name, path) for path in directory.iterdir()]
    manifest = inspect(receive(upload, tmp_path / "work", IntakeLimits()), base_model="someone/llama")
    assert (manifest.format, manifest.mergeable, manifest.method) == ("mlx", True, "lora")
    assert not manifest.report.warnings
    plan = PeftWriter().plan(subject_of(manifest, "peft", None))
    assert plan.pairs[0].a_name == f"base_model.model.{PATH}.lora_A.weight"
    assert (plan.config["r"], plan.config["lora_alpha"], plan.config["target_modules"]) == (5, 100, [PATH])
    assert (manifest.config["r"], manifest.config["lora_alpha"]) == (5, 100)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "adapter_config.json is missing: it looks like an MLX LoRA"),
        ({"peft_type": "LORA", "r": 5, "lora_alpha": 16}, "no lora_parameters"),
        ({"lora_parameters": {"rank": 5, "scale": 10.0, "alpha": 16.0}}, "alpha is ambiguous"),
        ({"lora_parameters": {"rank": 5}}, "scale is None"),
        ({"lora_parameters": {"rank": 5, "scale": True}}, "scale is True"),
        ({"lora_parameters": {"rank": 0, "scale": 1.0}}, "rank is 0"),
    ],
)
def test_no_scaling_is_guessed(folder: Folder, config: Any, words: str) -> None:
    with pytest.raises(ConfigRefused, match=words):
        Adapter.open(folder(factors_of(), config))


def test_a_dora_is_named_and_not_merged(folder: Folder) -> None:
    directory = folder(factors_of() | {f"{PATH}.m": torch.ones(6)}, CONFIG | {"fine_tune_type": "dora"})
    manifest = inspect(directory)
    assert not manifest.mergeable
    assert "DoRA" in (manifest.refusal or "")


def test_other_files_are_refused_by_name(folder: Folder) -> None:
    with pytest.raises(FileBroken, match="of rank 4, the configuration tells 5"):
        Adapter.open(folder(factors_of(rank=4)))
    experts = {f"{PATH}.lora_a": torch.zeros(2, 5, 7), f"{PATH}.lora_b": torch.zeros(2, 6, 5)}
    with pytest.raises(FileBroken, match="where a factor is a matrix"):
        Adapter.open(folder(experts))


@pytest.mark.parametrize("key", ["language_model.model.layers.0.self_attn.q_proj.lora_a", "model.norm.weight"])
def test_other_names_beside_its_configuration_are_told(folder: Folder, key: str) -> None:
    with pytest.raises(FormatUnknown, match=rf"is mlx-lm's, .*: its first key is '{key}'"):
        Adapter.open(folder({key: torch.zeros(7, 5)}))
