"""Adapters that stock PEFT itself saved: what is read must be what PEFT has in memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from artifacts.intake import inspect
from artifacts.manifest import AdapterManifest

LAYERS = ["q_proj", "v_proj", "conv", "conv1", "embed"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 6)
        self.v_proj = nn.Linear(6, 10)


class Tiny(nn.Module):
    """One layer of each kind that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv2d(3, 4, kernel_size=(3, 5))
        self.conv1 = nn.Conv1d(2, 5, kernel_size=3)
        self.classifier = nn.Linear(10, 2)


def save(directory: Path, **fields: Any) -> tuple[PeftModel, AdapterManifest]:
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": LAYERS, "init_lora_weights": False} | fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that the toy model has no configuration of transformers
        model = get_peft_model(Tiny(), config)
        model.save_pretrained(directory)
    return model, inspect(directory)


def adapted(model: PeftModel) -> Iterator[tuple[str, Any]]:
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "scaling"):
            yield name, layer


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 5, r"layers\.1\.v_proj": 2}, "alpha_pattern": {"^conv": 1, "v_proj": 4}},
        {"rank_pattern": {"^layers.0.q_proj": 5}, "use_rslora": True},
        {"target_modules": r".*\.[qv]_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": LAYERS, "exclude_modules": ["conv"]},
        {"init_lora_weights": "gaussian"},
        {"lora_bias": True, "target_modules": ["q_proj", "conv"]},
        {"init_lora_weights": "orthogonal", "r": 4, "target_modules": ["q_proj", "v_proj"]},
    ],
)
def test_modules_ranks_and_scalings_are_those_of_peft(tmp_path: Path, fields: dict[str, Any]) -> None:
    model, manifest = save(tmp_path, **fields)
    layers = dict(adapted(model))
    assert [module.path for module in manifest.modules] == sorted(layers)
    for module in manifest.modules:
        layer = layers[module.path]
        assert (module.rank, module.scaling) == (layer.r["default"], pytest.approx(layer.scaling["default"], rel=1e-12))
        delta = layer.get_delta_weight("default")
        assert (module.bias_key is not None) == bool(fields.get("lora_bias"))
        wide, tall = delta.shape[0], delta[0].numel()
        assert (module.d_out, module.d_in) == ((tall, wide) if module.kind == "embedding" else (wide, tall))
    assert manifest.mergeable
    assert manifest.report.ignored == ()
    assert not any("not selected" in warning or "matches no module" in warning for warning in manifest.report.warnings)


@pytest.mark.parametrize(
    ("fields", "method", "words"),
    [
        ({"use_dora": True, "target_modules": ["q_proj", "conv"]}, "dora", "use_dora is set"),
        ({"bias": "all"}, "lora", "bias is set"),
        ({"bias": "lora_only"}, "lora", "bias is set"),
        ({"modules_to_save": ["classifier"]}, "lora", "modules_to_save is set"),
        ({"init_lora_weights": "pissa", "target_modules": ["q_proj"]}, "lora", "PiSSA"),
        ({"init_lora_weights": "olora", "target_modules": ["q_proj"]}, "lora", "OLoRA"),
        (
            {"trainable_token_indices": {"embed": [1, 2]}, "target_modules": ["q_proj"]},
            "lora",
            "trainable_token_indices",
        ),
        ({"target_modules": [], "target_parameters": ["classifier.weight"]}, "lora", "target_parameters is set"),
    ],
)
def test_what_is_stored_but_not_merged(tmp_path: Path, fields: dict[str, Any], method: str, words: str) -> None:
    model, manifest = save(tmp_path, **fields)
    assert (manifest.method, manifest.mergeable) == (method, False)
    assert words in (manifest.refusal or "")
    report = manifest.report
    assert not any("not part of a LoRA adapter" in entry.reason for entry in report.ignored)
    if "target_parameters" not in fields:
        assert [module.path for module in manifest.modules] == sorted(path for path, _ in adapted(model))


@pytest.mark.parametrize(
    ("key", "loaded"),
    [
        ("layers.0.q_proj.base_layer.weight", True),
        ("layers.0.q_proj.base_layer.bias", True),
        ("layers.0.v_proj.weight", True),
        ("layers.0.v_proj.base_layer.weight", False),
        ("v_head.summary.weight", False),
    ],
)
def test_weights_beside_the_factors_keep_from_merging_what_peft_loads_them_into(
    tmp_path: Path, key: str, loaded: bool
) -> None:
    save(tmp_path, target_modules=["q_proj"])
    weights = tmp_path / "adapter_model.safetensors"
    shape = (6,) if key.endswith("bias") else (10, 6) if "v_proj" in key else (6, 8)
    save_file({**load_file(weights), f"base_model.model.{key}": torch.full(shape, 7.0)}, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that the toy model has no configuration of transformers
        model = PeftModel.from_pretrained(Tiny(), str(tmp_path))
    state = model.base_model.model.state_dict()
    assert (key in state and bool((state[key] == 7).all())) == loaded
    manifest = inspect(tmp_path)
    assert manifest.mergeable != loaded
    (verdict,) = (item for item in manifest.keys if item.key.endswith(key))
    assert verdict.use == ("kept" if loaded else "ignored")
    assert loaded or "PEFT does not load it" in verdict.note
    assert key in (manifest.refusal or "") or not loaded
