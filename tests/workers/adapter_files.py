"""Small random adapters in PEFT's layout, written with safetensors alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")


def write_adapter(
    folder: Path,
    seed: int,
    *,
    rank: int = 4,
    d_in: int = 48,
    d_out: int = 32,
    modules: tuple[str, ...] = MODULES,
    base_model: str = "example/base",
) -> Path:
    """A directory with adapter_model.safetensors and adapter_config.json."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in modules:
        prefix = f"base_model.model.{path}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({path.rpartition(".")[2] for path in modules}),
        "base_model_name_or_path": base_model,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
