"""The lazy mapping from modules to factors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from artifacts.adapter import Adapter

PREFIX = "base_model.model."


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {
        f"{PREFIX}layers.0.proj.lora_A.weight": torch.randn(4, 8),
        f"{PREFIX}layers.0.proj.lora_B.weight": torch.randn(6, 4),
        f"{PREFIX}conv.lora_A.weight": torch.randn(2, 3, 2, 5),
        f"{PREFIX}conv.lora_B.weight": torch.randn(7, 2, 1, 1),
        f"{PREFIX}embed.lora_embedding_A": torch.randn(4, 11),
        f"{PREFIX}embed.lora_embedding_B": torch.randn(6, 4),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["proj", "conv", "embed"],
        "rank_pattern": {"conv": 2},
        "alpha_pattern": {"embed": 1},
        "base_model_name_or_path": "tiny",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def test_it_is_a_mapping_of_factors(directory: Path) -> None:
    adapter = Adapter.open(directory)
    assert sorted(adapter) == ["conv", "embed", "layers.0.proj"]
    assert len(adapter) == 3
    assert "elsewhere" not in adapter
    with pytest.raises(KeyError):
        adapter["elsewhere"]
    assert {path: factors.scaling for path, factors in adapter.items()} == {
        "conv": 4.0,
        "embed": 0.25,
        "layers.0.proj": 2.0,
    }
    assert {path: (tuple(f.A.shape), tuple(f.B.shape), f.rank) for path, f in adapter.items()} == {
        "conv": ((2, 30), (7, 2), 2),
        "embed": ((4, 11), (6, 4), 4),
        "layers.0.proj": ((4, 8), (6, 4), 4),
    }


def test_writing_to_a_view_does_not_reach_the_file(directory: Path) -> None:
    before = (directory / "adapter_model.safetensors").read_bytes()
    adapter = Adapter.open(directory)
    adapter["conv"].A.zero_()
    assert (directory / "adapter_model.safetensors").read_bytes() == before


def test_views_survive_release(tmp_path: Path) -> None:
    torch.manual_seed(0)
    A, B = torch.randn(64, 512), torch.randn(512, 64)
    tensors = {f"{PREFIX}proj.lora_A.weight": A, f"{PREFIX}proj.lora_B.weight": B}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 64, "lora_alpha": 64, "target_modules": ["proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = Adapter.open(tmp_path)
    factors = adapter["proj"]
    adapter.release("proj")
    assert torch.equal(factors.A, A)
    assert torch.equal(factors.B, B)


def test_tensors_need_no_alignment(tmp_path: Path) -> None:
    """The format allows a header of any length, and so tensors at odd addresses."""
    A, B = torch.randn(2, 3), torch.randn(4, 2)
    raw = {f"{PREFIX}proj.lora_A.weight": A, f"{PREFIX}proj.lora_B.weight": B}
    header, body = {}, b""
    for name, tensor in raw.items():
        data = tensor.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text += b" " * ((-len(text)) % 8 + 3)
    (tmp_path / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    factors = Adapter.open(tmp_path)["proj"]
    assert torch.equal(factors.A, A)
    assert torch.equal(factors.B, B)
