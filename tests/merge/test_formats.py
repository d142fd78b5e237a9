"""Adapters of one model under two namings merge as what they are."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from artifacts.adapter import Adapter
from artifacts.base_model import BaseModelRef
from artifacts.intake import inspect
from merge import engine
from merge.catalog import parse_parameters
from merge.plan import MergeInput


def item(path: Path, name: str) -> MergeInput:
    manifest = inspect(path)
    return MergeInput(
        id=name,
        name=name,
        digest=manifest.weights_digest,
        modules=manifest.modules,
        method=manifest.method,
        mergeable=manifest.mergeable,
        refusal=manifest.refusal,
        base=BaseModelRef.named("flux"),
    )


def test_a_fused_kohya_file_and_a_diffusers_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stem, block = "lora_unet_double_blocks_0_img_attn_qkv", "transformer.transformer_blocks.0.attn"
    A, B = torch.randn(2, 8), torch.randn(24, 2)
    fused, single = tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors"
    save_file({f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B, f"{stem}.alpha": torch.tensor(1.0)}, fused)
    down, up = torch.randn(3, 8), torch.randn(8, 3)
    save_file({f"{block}.to_k.lora_A.weight": down, f"{block}.to_k.lora_B.weight": up}, single)
    options = parse_parameters("cat", {"missing_modules": "union"})
    inputs = [(item(fused, "kohya"), fused), (item(single, "diffusers"), single)]
    engine.merge_files(inputs, "cat", options, tmp_path / "out", device="cpu")
    merged = Adapter.open(tmp_path / "out")
    expected = {
        f"{block}.to_q": 0.5 * B[:8] @ A,
        f"{block}.to_k": 0.5 * B[8:16] @ A + up @ down,
        f"{block}.to_v": 0.5 * B[16:] @ A,
    }
    assert set(merged) == set(expected)
    for path, delta in expected.items():
        factors = merged[path]
        torch.testing.assert_close(factors.scaling * factors.B.float() @ factors.A.float(), delta, rtol=1e-4, atol=1e-4)
