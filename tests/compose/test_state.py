"""The pipeline is as it was: after a request, after a failure at any stage, and once its adapters are gone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts.errors import ComposeRefused
from compose.adapter_switch import tuner_layers
from compose.catalog import METHODS
from compose.engine import compose
from compose.fused_adapter import fuse
from compose.pipelines import LoadedPipeline, PipelineCache
from compose.request import Concept, Style
from compose.scene import Scene

QUICK = {
    "iterative_steps": [0], "iterative_repeats": 1, "step_size": 1.0, "gradient_checkpointing": True,
    "batch_branches": "auto", "use_text_encoder_lora": True,
}  # fmt: skip


class BoomError(Exception):
    """The injected failure."""


def state_of(loaded: LoadedPipeline) -> dict[str, Any]:
    """Every bit that a request could leave behind."""
    found: dict[str, Any] = {"scheduler": (id(loaded.pipeline.scheduler), repr(vars(loaded.pipeline.scheduler)))}
    for model in (*loaded.models, loaded.pipeline.vae):
        name = type(model).__name__
        for key, value in (*model.named_parameters(), *model.named_buffers()):
            digest = hashlib.sha256(value.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            found[f"{name} {key}"] = (digest, value.dtype, value.requires_grad, value.grad is None)
        for key, module in model.named_modules():
            hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks)
            flag = getattr(module, "gradient_checkpointing", None)
            processor = getattr(module, "processor", None)
            found[f"{name} {key} module"] = (
                type(module), module.training, [len(item) for item in hooks], flag, id(processor),
            )  # fmt: skip
        for index, layer in enumerate(tuner_layers(model)):
            found[f"{name} adapters {index}"] = (
                repr(layer._active_adapter), layer._disable_adapters, dict(layer.scaling), layer.merged,
            )  # fmt: skip
        found[f"{name} configs"] = sorted(getattr(model, "peft_config", None) or {})
    return found


@pytest.fixture
def loaded(sd: Any, pipelines: PipelineCache) -> LoadedPipeline:
    """With the adapters of a request, so that only switching is left to do."""
    found = pipelines.get(sd.base)
    compose(sd.request(method="merge", steps=1, styles=(Style(sd.text, "style"),)), pipelines)
    return found


LEFT = {"left": 0, "top": 0, "right": 0.5, "bottom": 1}
RIGHT = {"left": 0.5, "top": 0.25, "right": 1, "bottom": 1}
SHORT: dict[str, Any] = {
    "clora": QUICK,
    "freefuse": {"mask_steps": 1},
    "lora_composer": {"boxes": [LEFT, RIGHT], "max_iter_to_alter": 2, "step_size": 1.0},
    "omg": {"places": [{"boxes": [LEFT]}, {"boxes": [RIGHT]}]},
}


def short_request(sd: Any, method: str) -> Any:
    """Two steps of a method, with what it needs."""
    request = sd.request(method=method, parameters=SHORT.get(method, {}), steps=2)
    if method == "k_lora":
        return replace(request, concepts=request.concepts[:1], styles=(Style(sd.second, "second"),))
    return request


IMAGE_METHODS = [row.name for row in METHODS.values() if row.capabilities.yields == "image"]


@pytest.mark.parametrize("method", IMAGE_METHODS)
def test_a_request_leaves_no_trace(sd: Any, pipelines: Any, loaded: LoadedPipeline, method: str) -> None:
    before = state_of(loaded)
    compose(short_request(sd, method), pipelines)
    assert state_of(loaded) == before


@pytest.mark.parametrize("method", IMAGE_METHODS)
@pytest.mark.parametrize("stage", ["last prediction", "decoder"])
def test_every_method_leaves_no_trace_of_a_failure(
    sd: Any, pipelines: Any, loaded: LoadedPipeline, method: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state_of(loaded)
    target, count = {"last prediction": ("guide", 1), "decoder": ("decode", 0)}[stage]
    monkeypatch.setattr(Scene, target, _nth(count, getattr(Scene, target)))
    with pytest.raises(BoomError):
        compose(short_request(sd, method), pipelines)
    monkeypatch.undo()
    assert state_of(loaded) == before


@pytest.mark.parametrize("method", ["ziplora", "gradient_fusion"])
def test_fusing_leaves_no_trace_whether_it_ends_or_fails(
    sd: Any, pipelines: Any, loaded: LoadedPipeline, method: str, tmp_path: Path
) -> None:
    request = sd.request(method=method, steps=1, parameters={"samples": 1})
    if method == "ziplora":
        concepts, styles = request.concepts[:1], (Style(sd.second, "second"),)
        request = replace(request, concepts=concepts, styles=styles, parameters={"samples": 1, "train_steps": 2})
    before, steps = state_of(loaded), []
    found = fuse(request, pipelines, tmp_path / "whole", lambda report: steps.append((report.step, report.total)))
    assert state_of(loaded) == before
    assert found.directory.is_dir()
    assert steps == [(step, len(steps)) for step in range(1, len(steps) + 1)]
    for last in (1, 3, len(steps)):

        def stop(report: Any, last: int = last) -> None:
            if report.step == last:
                raise BoomError

        with pytest.raises(BoomError):
            fuse(request, pipelines, tmp_path / "broken", stop)
        assert state_of(loaded) == before
        assert not (tmp_path / "broken").exists()


def _nth(count: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """Works `count` times, then fails."""
    left = [count]

    def call(*args: Any, **kwargs: Any) -> Any:
        if not left[0]:
            raise BoomError
        left[0] -= 1
        return real(*args, **kwargs)

    return call


STAGES = {
    "encoding": ("compose.scene.Scene.encode", 1),
    "installing": ("compose.branches.Branches.__post_init__", 0),
    "maps without graph": ("compose.attention_maps.MapRecorder.add", 2),
    "maps with graph": ("compose.attention_maps.MapRecorder.add", 11),
    "loss": ("compose.methods.clora.contrastive_loss", 0),
    "gradient": ("torch.autograd.grad", 2),
    "second update": ("compose.latent_update.step_size", 0),
    "prediction": ("compose.methods.clora_mask_only.fuse", 1),
    "a batch of branches": ("compose.scene.Schedule.scaled", 5),
    "sampler": ("compose.schedulers.Schedule.step", 1),
    "decoder": ("compose.scene.Scene.decode", 0),
    "evidence": ("compose.methods.clora_mask_only.mask_picture", 1),
    "report": ("compose.methods.clora_mask_only.CloraMaskOnly.report", 0),
}


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_failure_leaves_no_trace(
    sd: Any, pipelines: Any, loaded: LoadedPipeline, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state_of(loaded)
    target, count = STAGES[stage]
    if stage == "second update":
        target = "compose.methods.clora.step_size"
    module, _, name = target.rpartition(".")
    owner: Any = pytest.importorskip(module) if module.count(".") == 1 else _class(module)
    monkeypatch.setattr(owner, name, _nth(count, getattr(owner, name)))
    with pytest.raises(BoomError):
        compose(sd.request(parameters=QUICK, steps=2, styles=(Style(sd.text, "style"),)), pipelines)
    monkeypatch.undo()
    assert state_of(loaded) == before
    assert not loaded.lock.locked()


def _class(path: str) -> Any:
    import importlib

    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def test_a_callback_that_stops_leaves_no_trace(sd: Any, pipelines: Any, loaded: LoadedPipeline) -> None:
    before, steps = state_of(loaded), []

    def stop(report: Any) -> None:
        steps.append((report.step, report.total, report.preview().size))
        if report.step == 2:
            raise BoomError

    with pytest.raises(BoomError):
        compose(sd.request(parameters=QUICK), pipelines, stop)
    assert steps == [(1, 4, (32, 32)), (2, 4, (32, 32))]
    assert state_of(loaded) == before


def test_an_adapter_that_can_not_be_loaded_leaves_no_trace(
    sd: Any, xl: Any, pipelines: Any, loaded: LoadedPipeline
) -> None:
    before = state_of(loaded)
    request = sd.request()
    wrong = replace(request.concepts[1], adapter=xl.text)
    with pytest.raises(ComposeRefused, match=r"do not fit|matches no module") as refused:
        compose(replace(request, concepts=(request.concepts[0], wrong)), pipelines)
    assert refused.value.errors[0].pointer == "/concepts/1/adapter"
    assert state_of(loaded) == before


def test_without_its_adapters_it_is_as_it_was_loaded(toys: Any) -> None:
    loaded = LoadedPipeline.load(toys.base)
    loaded.pipeline.encode_prompt(prompt="a", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    # … because transformers hooks into its layers on their first use
    fresh = state_of(loaded)
    cache = PipelineCache(loaded=_ordered(toys.base, loaded))
    request = toys.request(method="merge", steps=1, styles=(Style(toys.text, "style"),))
    compose(request, cache)
    assert len(loaded.names) == 3
    assert state_of(loaded) != fresh
    loaded.evict(0)
    assert state_of(loaded) == fresh


def test_adapters_stay_within_their_bound_the_least_used_go_first(sd: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    loaded = LoadedPipeline.load(sd.base, max_adapters=2)
    fresh = state_of(loaded)
    cache = PipelineCache(loaded=_ordered(sd.base, loaded))
    one = sd.request(method="merge", steps=1)
    compose(one, cache)
    kept = list(loaded.names.values())
    style = (Style(sd.text, "style"),)
    compose(replace(one, styles=style), cache)  # needs three, and has them until it ends
    assert len(loaded.names) == 2
    assert kept[1] in loaded.names.values()
    with pytest.raises(BoomError):
        compose(replace(one, styles=style), cache, _boom)
    assert len(loaded.names) == 2
    # the same path with other contents is another adapter
    folder = tmp_path / "changing"
    folder.mkdir()
    file = folder / "pytorch_lora_weights.safetensors"
    source = sd.first / file.name
    file.write_bytes(source.read_bytes())
    changing = replace(one, concepts=(Concept(folder, "changing", "sks", "circle"),), prompt="a circle")
    first = compose(changing, cache).image
    from safetensors import safe_open

    with safe_open(source, "pt") as opened:
        metadata = opened.metadata()
    save_file({key: -3 * value for key, value in load_file(source).items()}, file, metadata)
    assert compose(changing, cache).image.tobytes() != first.tobytes()
    loaded.evict(0)
    assert state_of(loaded) == fresh


def _boom(report: Any) -> None:
    raise BoomError


def _ordered(base: Path, loaded: LoadedPipeline) -> Any:
    from collections import OrderedDict

    return OrderedDict({base.resolve(): loaded})


def test_pipelines_stay_within_their_bound(sd: Any, xl: Any) -> None:
    cache = PipelineCache(most=1)
    first = cache.get(sd.base)
    assert cache.get(sd.base) is first
    cache.get(xl.base)
    assert list(cache.loaded) == [xl.base.resolve()]
