"""ZipLoRA on tiny random pipelines: the export is the merged model, and what training must do."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from final_latents import final_latents, same
from safetensors.torch import load_file

from artifacts.errors import ComposeRefused, RequestInvalid
from compose.adapter_files import WEIGHTS_NAME
from compose.engine import compose, make_scene
from compose.fused_adapter import fuse, write_adapter
from compose.methods.ziplora import ZipLora
from compose.request import Concept, Style
from compose.validation import validate

QUICK = {"samples": 1, "train_steps": 3}


def pair(toys: Any, **changes: Any) -> Any:
    fields = {
        "method": "ziplora",
        "concepts": (Concept(toys.first, "first", "sks", "circle", 0.8),),
        "styles": (Style(toys.second, "second", 1.2),),
        "prompt": "a circle and a square",
        "parameters": QUICK,
        "steps": 2,
    }
    return toys.request(**{**fields, **changes})


def merged_with(request: Any, directory: Path) -> Any:
    """The picture of the new adapter alone."""
    alone = (Concept(directory, "fused", "sks", "circle"),)
    return replace(request, method="merge", parameters={}, concepts=alone, styles=(), steps=4)


def test_vectors_that_stay_at_one_are_the_weighted_sum(toys: Any, pipelines: Any, tmp_path: Path) -> None:
    request = pair(toys, parameters={**QUICK, "learning_rate": 0.0})
    found = fuse(request, pipelines, tmp_path / "fused")
    assert found.rank == 4
    merge = replace(request, method="merge", parameters={}, steps=4)
    same(final_latents(merged_with(request, found.directory), pipelines), final_latents(merge, pipelines))
    error = found.report["error"]
    assert error["before"] == error["after"]


def test_the_export_is_the_merged_model(toys: Any, pipelines: Any, tmp_path: Path) -> None:
    """With vectors far from 1, a time and a latent of their own; and every file stays a plain LoRA."""
    request = pair(toys, parameters={**QUICK, "learning_rate": 0.3}, height=40, width=24)
    loaded = pipelines.get(request.base)
    with loaded.lock, torch.no_grad(), loaded.restored(), ExitStack() as stack:
        scene = make_scene(loaded, request, validate(request, yields="adapter"))
        method = ZipLora(scene, stack)
        factors = method.fused(lambda: None)
        spread = torch.cat([item.flatten() for item in method.mergers.values()])
        assert float((spread - 1).abs().max()) > 0.2
        latents = torch.randn(1, 4, *scene.latent_size, generator=torch.Generator().manual_seed(8))
        both = {side.name: side.weight for side in method.sides}
        words = method.sides[0].words
        merged = method._predicted(both, latents, torch.tensor(500), words, merging=True)
        write_adapter(tmp_path, factors, request, torch.float32)
        name = loaded.adapter(tmp_path, "fused", "/concepts/0/adapter")
        loaded.activate_unet({name: 1.0})
        alone = scene.forward(latents, torch.tensor(500), words, conditional_only=True)
        unequal = method._predicted(both, latents, torch.tensor(500), words, merging=False)
    assert alone is not None
    torch.testing.assert_close(alone, merged, atol=1e-5, rtol=0)
    assert float((alone - unequal).abs().max()) > 1e-3
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 4, "LORA")
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    assert len(tensors) == 2 * len(factors) == 2 * len(config["target_modules"])


def test_training_lowers_the_error_and_the_weight_of_similarity_parts_the_columns(
    sd: Any, pipelines: Any, tmp_path: Path
) -> None:
    free = {"samples": 1, "train_steps": 25, "learning_rate": 0.03, "similarity_weight": 0.0}
    found = fuse(pair(sd, parameters=free), pipelines, tmp_path / "free").report
    before, after = found["error"]["before"], found["error"]["after"]
    assert sum(after.values()) < 0.8 * sum(before.values())
    parted = fuse(pair(sd, parameters={**free, "similarity_weight": 10.0}), pipelines, tmp_path / "parted").report
    assert parted["similarity"] < 0.5 * found["similarity"]
    assert found["passes"]["backward"] == 50
    again = fuse(pair(sd, parameters=free), pipelines, tmp_path / "again").report
    assert again["error"] == found["error"]  # a seed gives the same adapter


def test_layers_that_one_adapter_lacks_are_filled_up_with_zeros(sd: Any, pipelines: Any, tmp_path: Path) -> None:
    from test_k_lora import partial_adapters

    first, second = partial_adapters(sd, tmp_path)
    request = pair(
        sd,
        concepts=(Concept(first, "first", "sks", "circle"),),
        styles=(Style(second, "second"),),
        parameters={**QUICK, "learning_rate": 0.0},
    )
    found = fuse(request, pipelines, tmp_path / "fused")
    merge = replace(request, method="merge", parameters={}, steps=4)
    same(final_latents(merged_with(request, found.directory), pipelines), final_latents(merge, pipelines))


def test_parts_for_the_text_encoder_are_refused_or_dropped(sd: Any, pipelines: Any, tmp_path: Path) -> None:
    request = pair(sd, styles=(Style(sd.text, "text"),))
    with pytest.raises(ComposeRefused, match="text encoder") as refused:
        fuse(request, pipelines, tmp_path / "fused")
    assert [item.pointer for item in refused.value.errors] == ["/styles/0/adapter"]
    assert not (tmp_path / "fused").exists()
    found = fuse(replace(request, parameters={**QUICK, "text_encoder": "drop"}), pipelines, tmp_path / "fused")
    assert any("/styles/0/adapter" in item for item in found.report["warnings"])


def test_what_can_not_be_fused_is_refused(sd: Any, pipelines: Any, tmp_path: Path) -> None:
    with pytest.raises(ComposeRefused, match="nothing to fuse"):
        fuse(pair(sd, styles=(Style(sd.first, "first"),)), pipelines, tmp_path / "x")
    for changes, pointer in (
        ({"styles": ()}, "/styles"),
        ({"parameters": {"train_steps": 0}}, "/parameters/train_steps"),
    ):
        with pytest.raises(RequestInvalid) as refused:
            fuse(pair(sd, **changes), pipelines, tmp_path / "x")
        assert pointer in {item.pointer for item in refused.value.errors}


def test_methods_give_what_they_are_asked_for(sd: Any, pipelines: Any, tmp_path: Path) -> None:
    with pytest.raises(ComposeRefused, match="yields an adapter, not an image") as refused:
        compose(pair(sd), pipelines)
    assert [item.pointer for item in refused.value.errors] == ["/method"]
    with pytest.raises(ComposeRefused, match="yields an image, not an adapter"):
        fuse(sd.request(method="merge"), pipelines, tmp_path / "x")
