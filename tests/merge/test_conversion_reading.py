"""A conversion reads its adapter module by module, and finds the modules of every component of diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from artifacts.adapter import Adapter
from artifacts.layout import METADATA_KEY
from merge.conversion import convert_to_lora

UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def delta(folder: Path, path: str) -> Tensor:
    factors = Adapter.open(folder)[path]
    return factors.scaling * factors.B @ factors.A


@pytest.mark.parametrize("foreign", [False, True])
def test_of_all_tensors_only_those_of_one_module_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: bool
) -> None:
    begin = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_" if foreign else "base_model.model."
    parts = {"lokr_w1": numbers(4, 4), "lokr_w2_a": numbers(80, 2), "lokr_w2_b": numbers(2, 80)}
    tensors = {f"{begin}{name}.{role}": value.clone() for name in "qkv" for role, value in parts.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    if not foreign:
        config = {"peft_type": "LOKR", "r": 2, "alpha": 2, "target_modules": ["q", "k", "v"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    read: list[str] = []
    of_adapter = Adapter.tensor

    def counted(self: Adapter, key: str) -> Tensor:
        read.append(key)
        return of_adapter(self, key)

    monkeypatch.setattr(Adapter, "tensor", counted)
    seen: list[int] = []
    convert_to_lora(tmp_path, tmp_path / "out", progress=lambda _part, _text: seen.append(len(read)))
    assert (seen, len(read)) == ([0, 3, 6], 9)


def dora(W: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors, and ΔW by PEFT's formula at a scaling of 2."""
    A, B, m = numbers(2, W.shape[1]), numbers(W.shape[0], 2) * 0.1, numbers(W.shape[0], seed=1)
    directed = W + 2 * B @ A
    parts = {"lora_A.weight": A, "lora_B.weight": B, "lora_magnitude_vector": m}
    return parts, m[:, None] * directed / directed.norm(dim=1, keepdim=True) - W


def test_a_dora_that_diffusers_saved_with_its_configuration(tmp_path: Path) -> None:
    """One of the components is a plain LoRA."""
    base, W = tmp_path / "base", numbers(16, 16)
    (base / "text_encoder").mkdir(parents=True)
    (base / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    save_file({f"{TEXT}.weight": W}, base / "text_encoder" / "model.safetensors")
    parts, wanted = dora(W)
    pair = {"lora_A.weight": numbers(4, 320), "lora_B.weight": numbers(320, 4)}
    tensors = {f"text_encoder.{TEXT}.{name}": value for name, value in parts.items()}
    tensors |= {f"unet.{UNET}.{name}": value for name, value in pair.items()}
    config: dict[str, Any] = {"text_encoder.r": 2, "text_encoder.lora_alpha": 4, "text_encoder.use_dora": True}
    config |= {"unet.r": 4, "unet.lora_alpha": 2}
    save_file(tensors, tmp_path / "x.safetensors", metadata={METADATA_KEY: json.dumps(config)})
    report = convert_to_lora(tmp_path / "x.safetensors", tmp_path / "out", rank=16, base=base)
    assert (report.source, len(report.modules)) == ("dora", 2)
    torch.testing.assert_close(delta(tmp_path / "out", f"text_encoder.{TEXT}"), wanted, rtol=1e-3, atol=1e-4)
    expected = 0.5 * pair["lora_B.weight"] @ pair["lora_A.weight"]
    torch.testing.assert_close(delta(tmp_path / "out", f"unet.{UNET}"), expected, rtol=1e-4, atol=1e-4)
