"""K-LoRA on tiny random pipelines: its rule by hand, and its limits."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from final_latents import final_latents, made, same
from safetensors.torch import load_file, save_file

from artifacts.errors import ComposeRefused, RequestInvalid
from compose.adapter_switch import tuner_layers
from compose.engine import compose, make_scene
from compose.largest_entries import entry_sums
from compose.methods.k_lora import KLora
from compose.request import Concept, Style
from compose.validation import validate

NO_TEXT = {"use_text_encoder_lora": False}


def pair(toys: Any, **changes: Any) -> Any:
    """The first adapter as content, the second as style."""
    fields = {
        "method": "k_lora",
        "concepts": (Concept(toys.first, "first", "sks", "circle", 0.8),),
        "styles": (Style(toys.second, "second", 1.2),),
        "prompt": "a circle and a square",
    }
    return toys.request(**{**fields, **changes})


@pytest.mark.parametrize("chunk", [1, 100, 10**6])
def test_sums_are_those_of_the_whole_matrix(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 20, generator=generator), torch.randn(31, 3, generator=generator)
    entries = (-1.5 * B @ A).abs().flatten()
    found = entry_sums(A, B, -1.5, 17, chunk)
    assert found.all == pytest.approx(float(entries.sum()), rel=1e-5)
    assert found.largest == pytest.approx(float(entries.sort(descending=True).values[:17].sum()), rel=1e-5)
    every = entry_sums(A, B, -1.5, 10**6, chunk)
    assert every.largest == pytest.approx(every.all, rel=1e-6)
    conv = entry_sums(A.view(3, 5, 2, 2), B.view(31, 3, 1, 1), -1.5, 17, chunk)
    assert (conv.all, conv.largest) == pytest.approx((found.all, found.largest))


def test_the_choice_is_the_rule_by_hand(toys: Any, pipelines: Any) -> None:
    request = pair(toys, steps=5)
    found = compose(request, pipelines).report
    loaded = pipelines.get(request.base)
    with loaded.lock, torch.no_grad(), loaded.restored(), ExitStack() as stack:
        scene = make_scene(loaded, request, validate(request))
        sums = []
        for layer in tuner_layers(loaded.unet):
            deltas = []
            for name, weight in ((scene.concepts[0], 0.8), (scene.styles[0], 1.2)):
                layer.set_scale(name, 1.0)
                deltas.append((weight * layer.get_delta_weight(name)).abs().flatten())
            sums.append([(float(item.sum()), float(item.sort().values[-4:].sum())) for item in deltas])
        gamma = sum(content[0] / style[0] for content, style in sums) / len(sums)
        expected = [
            [content[1] / gamma > style[1] * (1.5 * step / 5 + 0.5) for content, style in sums] for step in range(5)
        ]
        method = KLora(scene, stack)
        method.prepare()
        latents = torch.randn(1, 4, *scene.latent_size)
        for step, timestep in enumerate(scene.schedule.timesteps):
            method.step(step, timestep, latents)
            for layer, content in zip(tuner_layers(loaded.unet), expected[step], strict=True):
                assert layer.active_adapters == [scene.concepts[0] if content else scene.styles[0]]
                weight = 0.8 if content else 1.2
                assert layer.scaling[layer.active_adapters[0]] == pytest.approx(2 * weight)
    assert found["gamma"] == pytest.approx(gamma, rel=1e-5)
    assert found["content_layers"] == [sum(row) for row in expected]
    assert found["content_layers"][0] > found["content_layers"][-1]  # the rule is at work, and style gains


def test_a_style_that_never_counts_or_always_does_is_one_adapter_alone(toys: Any, pipelines: Any) -> None:
    request = pair(toys)
    content = replace(request, parameters={"alpha": 0.0, "beta": 0.0})
    same(
        final_latents(content, pipelines),
        final_latents(replace(request, method="merge", parameters={}, styles=()), pipelines),
    )
    style = replace(request, parameters={"beta": 1000.0})
    silent = (replace(request.concepts[0], weight=0.0),)
    same(
        final_latents(style, pipelines),
        final_latents(replace(request, method="merge", parameters={}, concepts=silent), pipelines),
    )


def test_two_equal_adapters_are_one(toys: Any, pipelines: Any) -> None:
    request = pair(toys, styles=(Style(toys.peft, "copy", 0.8),))  # the same tensors, stored otherwise
    alone = final_latents(replace(request, method="merge", parameters={}, styles=()), pipelines)
    same(final_latents(request, pipelines), alone)
    itself = replace(request, styles=(Style(toys.first, "first", 0.8),))  # the very same file
    found, latents = made(itself, pipelines)
    same(latents, alone)
    assert found.report["gamma"] == pytest.approx(1.0)


def partial_adapters(sd: Any, tmp_path: Path) -> list[Path]:
    """Two adapters, the first without the down block, the second without the mid block."""
    parts = []
    for index, (source, missing) in enumerate(((sd.first, "down_blocks"), (sd.second, "mid_block"))):
        tensors = load_file(source / "pytorch_lora_weights.safetensors")
        kept = {key.removeprefix("unet."): value for key, value in tensors.items() if missing not in key}
        folder = tmp_path / str(index)
        folder.mkdir()
        save_file(
            {f"base_model.model.{key}": value for key, value in kept.items()}, folder / "adapter_model.safetensors"
        )
        config = json.loads((sd.peft / "adapter_config.json").read_text())
        config["target_modules"] = sorted({key.partition(".lora_")[0] for key in kept})
        (folder / "adapter_config.json").write_text(json.dumps(config))
        parts.append(folder)
    return parts


def test_layers_that_one_adapter_lacks_are_the_others(sd: Any, pipelines: Any, tmp_path: Path) -> None:
    parts = partial_adapters(sd, tmp_path)
    request = pair(
        sd, concepts=(Concept(parts[0], "first", "sks", "circle"),), styles=(Style(parts[1], "second"),), steps=2
    )
    loaded = pipelines.get(sd.base)
    with loaded.lock, torch.no_grad(), loaded.restored(), ExitStack() as stack:
        scene = make_scene(loaded, request, validate(request))
        method = KLora(scene, stack)
        method.prepare()
        method.step(0, scene.schedule.timesteps[0], torch.randn(1, 4, *scene.latent_size))
        for path, layer in loaded.unet.named_modules():
            if layer in tuner_layers(loaded.unet) and "mid_block" in path:
                assert layer.active_adapters == [scene.concepts[0]]
            if layer in tuner_layers(loaded.unet) and "down_blocks" in path:
                assert layer.active_adapters == [scene.styles[0]]


def test_pictures_that_are_not_square_and_the_text_encoders(sd: Any, pipelines: Any) -> None:
    request = pair(sd, height=40, width=24, concepts=(Concept(sd.text, "text", "sks", "circle"),))
    found, latents = made(request, pipelines)
    assert found.image.size == (24, 40)
    without = final_latents(replace(request, parameters=NO_TEXT), pipelines)
    assert float((latents - without).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"styles": ()}, "/styles"),
        ({"styles": (Style(Path("x"), "x"), Style(Path("y"), "y"))}, "/styles"),
        ({"concepts": ()}, "/concepts"),
        ({"parameters": {"top_k": 0}}, "/parameters/top_k"),
        ({"parameters": {"alpha": -1}}, "/parameters/alpha"),
        ({"parameters": {"beta": float("inf")}}, "/parameters/beta"),
    ],
)
def test_other_than_one_content_and_one_style_is_refused(sd: Any, changes: Any, pointer: str) -> None:
    with pytest.raises(RequestInvalid) as refused:
        validate(pair(sd, **changes))
    assert pointer in {item.pointer for item in refused.value.errors}
    with pytest.raises(ComposeRefused, match="takes at most 1"):
        validate(pair(sd, concepts=sd.request().concepts))


def test_an_adapter_that_is_no_plain_lora_is_refused(sd: Any, pipelines: Any, tmp_path: Path) -> None:
    folder = tmp_path / "dora"
    shutil.copytree(sd.peft, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    base = pipelines.get(sd.base).unet
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        module = base.get_submodule(path)
        weight = getattr(module, "base_layer", module).weight
        tensors[key.replace("lora_A.weight", "lora_magnitude_vector")] = weight.norm(dim=1).clone()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ComposeRefused, match="no plain LoRA") as refused:
        compose(pair(sd, styles=(Style(folder, "dora"),)), pipelines)
    assert [item.pointer for item in refused.value.errors] == ["/styles/0/adapter"]
