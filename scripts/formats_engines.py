"""Whether a file's ΔW are those of the library that people load it with: diffusers' converters, and stock PEFT.

Files are made of the names and shapes of the corpus and random numbers. The converters need the true sizes, for which
the first block of each kind is enough; PEFT takes any.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from artifacts.adapter import Adapter
from artifacts.errors import RankwiseError
from artifacts.layout import CONFIG_NAME, WEIGHTS_NAME, AdapterLayout
from artifacts.manifest import LoraModule
from scripts.formats_report import CorpusValues, document_of, header_of, layouts, read

FIRST = r"(_|\.)0(_|\.)|^lora_te|final_layer|time_in|img_in"
"""Of large files the first block of each kind is enough: their names differ in a number only."""

LOADERS = {
    "sd1": "StableDiffusion",
    "sd2": "StableDiffusion",
    "sdxl": "StableDiffusionXL",
    "sd35-large": "SD3",
    "flux": "Flux",
    "flux2": "Flux2",
    "wan21-1.3b": "Wan",
    "wan-14b": "Wan",
    "wan-14b-i2v": "Wan",
    "qwen-image": "QwenImage",
    "hunyuan-video": "HunyuanVideo",
    "z-image": "ZImage",
    "ltx-video": "LTXVideo",
    "ltx-2": "LTX2",
    "hidream": "HiDreamImage",
    "auraflow": "AuraFlow",
    "cogvideox-5b": "CogVideoX",
    "mochi": "Mochi1",
    "sana": "Sana",
    "krea2": "Krea2",
}
"""Architecture → whose loader of diffusers has the converter."""
CHOSEN = {
    "kohya/sd15-kohya-r32": r"mid_block|layers_0_|down_blocks_0",
    "kohya/sd21-kohya-r16": r"mid_block|layers_0_",
    "kohya/sdxl-kohya-sgm-r32": r"middle_block_1_t\w+_0_|input_blocks_4|layers_0_",
    "kohya/flux-kohya-te1-invoke": r"_blocks_0_|layers_0_",
    "kohya/sdxl-kohya-locon": r"middle_block_0|output_blocks_2_|input_blocks_3_",
    "kohya/wan21-14b-i2v-musubi": "blocks_0_",
    "kohya/wan21-1.3b-musubi": ".",  # the converter wants every block
    "lycoris/sd15-lycoris-locon": r"mid_block|layers_0_|samplers",
    "diffusers/sd15-attnprocs-prefixed-te": r"mid_block|layers\.0\.",
}
"""Layout → the keys that are compared, where they are not `FIRST`."""

PEFT_LOADS_NOT = {"peft/var-fsdp-wrapped", "peft/var-orig_mod"}
"""PEFT leaves all of their tensors out, and says no more than a warning: names that wrappers left."""
_PROBES = 8


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of one layout: how many modules were compared, and the largest ‖ΔW − ΔW'‖/‖ΔW'‖ of one."""

    engine: str
    modules: int
    difference: float


def diffusers_candidates() -> dict[str, str]:
    """Layout → architecture, of the mergeable LoRAs that diffusers loads whole."""
    found = {}
    for name, layout in layouts().items():
        if layout["expected"].get("diffusers", {}).get("verdict") != "accepts":
            continue
        understood = read(layout)
        if not understood.refusals:
            found[name] = str(understood.facts.architecture)
    return found


def against_diffusers(name: str, architecture: str) -> Comparison:
    """Compare a layout with what diffusers' own converter makes of it.

    Raises:
        AssertionError: diffusers has other modules.
    """
    tensors, mixin = _numbers(layouts()[name], CHOSEN.get(name, FIRST)), f"{LOADERS[architecture]}LoraLoaderMixin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        save_file(tensors, path)
        ours = Adapter.open(path)
        state, alphas = _converted(mixin, tensors)
        ends = r"(lora_A|lora\.down|_lora\.down|lora_linear_layer\.down)\.weight$"
        assert sum(bool(re.search(ends, key)) for key in state) == len(ours), f"{name}: diffusers has other modules"
        return Comparison("diffusers", len(ours), max(_differences(ours, state, alphas)))


def _converted(mixin: str, tensors: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Mapping[str, float]]:
    from diffusers.loaders import lora_pipeline

    extra: dict[str, Any] = {}
    if mixin.startswith("StableDiffusionXL"):
        extra["unet_config"] = SimpleNamespace(layers_per_block=2)
    if mixin.startswith("FluxLora"):
        extra["return_alphas"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copies = {key: value.clone() for key, value in tensors.items()}
        told = getattr(lora_pipeline, mixin).lora_state_dict(copies, **extra)
    state, alphas = told if isinstance(told, tuple) else (told, None)
    return state, alphas or {}


def _differences(ours: Adapter, state: Mapping[str, Tensor], alphas: Mapping[str, float]) -> Iterable[float]:
    probe = torch.Generator().manual_seed(1)
    for path, factors in ours.items():
        stem, down, up = next(item for item in _names(path) if f"{item[0]}.{item[1]}.weight" in state)
        A, B = (state[f"{stem}.{half}.weight"].flatten(1).double() for half in (down, up))
        x = torch.randn(A.shape[1], _PROBES, generator=probe, dtype=torch.float64)
        expected = _alpha_of(stem, alphas, len(A)) / len(A) * (B @ (A @ x))
        found = factors.scaling * (factors.B.double() @ (factors.A.double() @ x))
        yield distance(found, expected)


def distance(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖/‖expected‖, or ‖found‖ where nothing is expected; infinite where there are NaN, which no
    comparison would find too large."""
    value = float((found - expected).norm() / (expected.norm() or 1.0))
    return math.inf if math.isnan(value) else value


def _numbers(layout: Any, chosen: str) -> dict[str, Tensor]:
    header, values = header_of(layout), CorpusValues(layout)
    random = torch.Generator().manual_seed(0)
    found = {}
    for key, info in header.tensors.items():
        if not re.search(chosen, key):
            continue
        if key.endswith(".alpha"):
            found[key] = torch.tensor(values.scalar(info))
        else:
            found[key] = _blocks(layout, key, torch.randn(info.shape, generator=random) * 0.05)
    return found


def _blocks(layout: Any, key: str, tensor: Tensor) -> Tensor:
    """The up matrices that the corpus calls block-diagonal."""
    if not any(re.search(pattern[3:], key) for pattern in layout.get("fill", {})):
        return tensor
    rows, columns = tensor.shape
    sizes = [3072] * 3 + ([rows - 9216] if rows > 9216 else [])
    width, mask, start = columns // len(sizes), torch.zeros_like(tensor), 0
    for position, size in enumerate(sizes):
        mask[start : start + size, position * width : (position + 1) * width] = 1
        start += size
    return tensor * mask


def _alpha_of(stem: str, alphas: Mapping[str, float], rank: int) -> float:
    """diffusers leaves parts of the factor's name in the keys of some alphas."""
    found = {float(alpha) for key, alpha in alphas.items() if key.startswith(f"{stem}.") and key.endswith(".alpha")}
    assert len(found) <= 1
    return found.pop() if found else rank


def _names(path: str) -> list[tuple[str, str, str]]:
    """How diffusers may call the factors of a module after its conversion."""
    attention, _, layer = path.removesuffix(".to_out.0").rpartition(".")
    old = (
        f"{path.removesuffix('.to_out.0')}.processor.to_out"
        if path.endswith(".to_out.0")
        else f"{attention}.processor.{layer}"
    )
    text = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}.get(layer, layer)
    return [
        (path, "lora_A", "lora_B"),
        (path, "lora.down", "lora.up"),
        (path, "lora_linear_layer.down", "lora_linear_layer.up"),
        (f"{attention}.{text}", "lora_linear_layer.down", "lora_linear_layer.up"),
        (f"{old}_lora", "down", "up"),
        (f"{attention}.{text}_lora", "down", "up"),
    ]


def peft_candidates() -> dict[str, AdapterLayout]:
    """Layouts of mergeable LoRAs with a configuration of PEFT."""
    found = {}
    for name, layout in layouts().items():
        document = document_of(layout)
        if document is None or document.get("peft_type", "LORA") != "LORA":
            continue
        try:
            understood = read(layout)
        except RankwiseError:
            continue
        if not understood.refusals:
            found[name] = understood
    return found


def against_peft(name: str, understood: AdapterLayout) -> Comparison | None:
    """Compare a layout with what stock PEFT makes of it; None where PEFT leaves tensors out."""
    document = dict(document_of(layouts()[name]))
    with tempfile.TemporaryDirectory() as text, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(text)
        tensors = _small_tensors(understood)
        save_file(tensors, folder / WEIGHTS_NAME)
        (folder / CONFIG_NAME).write_text(json.dumps(document))
        ours = Adapter.open(folder)
        layers = _peft_layers(folder, tensors, ours)
        if layers is None:
            return None
        assert layers.keys() == ours.keys(), f"{name}: PEFT has other modules"
        worst = 0.0
        for path, found in ours.items():
            expected = layers[path].get_delta_weight("default").detach().double()
            if ours.config.fan_in_fan_out or ours.modules[path].kind == "embedding":
                expected = expected.T
            delta = (found.scaling * found.B.double() @ found.A.double()).reshape(expected.shape)
            worst = max(worst, distance(delta, expected))
        return Comparison("PEFT", len(ours), worst)


def _small(modules: tuple[LoraModule, ...]) -> dict[int, int]:
    """Side → a small one, another for each."""
    sides = {side for module in modules for side in (module.a_shape[1], module.b_shape[0])}
    return {side: 6 + 2 * number for number, side in enumerate(sorted(sides))}


def _small_tensors(understood: AdapterLayout) -> dict[str, Tensor]:
    """The factors and biases with small sides; what else a file may hold, as copies of layers, is no part of ΔW."""
    sizes = _small(understood.modules)
    shapes = {}
    for module in understood.modules:
        shapes[module.a_key] = (module.a_shape[0], sizes[module.a_shape[1]], *module.a_shape[2:])
        shapes[module.b_key] = (sizes[module.b_shape[0]], *module.b_shape[1:])
        if module.bias_key is not None:
            shapes[module.bias_key] = (sizes[module.b_shape[0]],)
    random = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=random) for key, shape in shapes.items()}


def _base_of(adapter: Adapter) -> nn.Module:
    """A model that has the adapter's modules, and as many rows and columns as its factors."""
    from transformers.pytorch_utils import Conv1D

    root = nn.Module()
    for path, module in adapter.modules.items():
        made: nn.Module
        if module.kind == "embedding":
            made = nn.Embedding(module.d_in, module.d_out)
        elif module.kind == "conv":
            made = nn.Conv2d(module.a_shape[1], module.d_out, module.a_shape[2:])  # type: ignore[arg-type]
        elif adapter.config.fan_in_fan_out:
            made = Conv1D(module.d_out, module.d_in)
        else:
            made = nn.Linear(module.d_in, module.d_out)
        parent = root
        *above, last = path.split(".")
        for level in above:
            if level not in parent._modules:
                parent.add_module(level, nn.Module())
            parent = parent.get_submodule(level)
        parent.add_module(last, made)
    return root


def _peft_layers(folder: Path, tensors: Mapping[str, Tensor], ours: Adapter) -> dict[str, Any] | None:
    """Path → layer of a model that PEFT has loaded the adapter into; None where it leaves tensors out."""
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(folder)
    config.task_type = None
    if config.target_modules == "all-linear":  # which PEFT takes for models of transformers only
        config.target_modules = sorted({path.rpartition(".")[2] for path in ours})
    model = PeftModel(_base_of(ours), config)
    told = set_peft_model_state_dict(model, {key: value.clone() for key, value in tensors.items()})
    if told.unexpected_keys or any("lora_" in key for key in told.missing_keys):
        return None
    return {path: layer for path, layer in model.base_model.model.named_modules() if hasattr(layer, "scaling")}


def comparisons() -> dict[str, Comparison]:
    """Layout → its comparison, of every layout that diffusers' converters or PEFT load whole."""
    found = {name: against_diffusers(name, architecture) for name, architecture in diffusers_candidates().items()}
    for name, understood in peft_candidates().items():
        told = against_peft(name, understood)
        if told is not None:
            found[name] = told
    return found
