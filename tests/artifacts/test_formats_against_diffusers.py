"""The deltas of foreign files are those that diffusers' own converters give, where it converts them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from artifacts.adapter import Adapter
from scripts.formats_report import CorpusValues, header_of, layouts

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

FIRST = r"(_|\.)0(_|\.)|^lora_te|final_layer|time_in|img_in"
"""Of large files the first block of each kind is enough: their names differ in a number only."""

CASES = {
    "kohya/sd15-kohya-r32": ("StableDiffusionLoraLoaderMixin", r"mid_block|layers_0_|down_blocks_0"),
    "kohya/sd21-kohya-r16": ("StableDiffusionLoraLoaderMixin", r"mid_block|layers_0_"),
    "lycoris/sd15-lycoris-locon": ("StableDiffusionLoraLoaderMixin", r"mid_block|layers_0_|samplers"),
    "kohya/sdxl-kohya-sgm-r32": (
        "StableDiffusionXLLoraLoaderMixin",
        r"middle_block_1_t\w+_0_|input_blocks_4|layers_0_",
    ),
    "kohya/sdxl-kohya-locon": ("StableDiffusionXLLoraLoaderMixin", r"middle_block_0|output_blocks_2_|input_blocks_3_"),
    "diffusers/sd15-attnprocs-prefixed-te": ("StableDiffusionLoraLoaderMixin", r"mid_block|layers\.0\."),
    "kohya/flux-kohya-double-only": ("FluxLoraLoaderMixin", FIRST),
    "kohya/flux-kohya-split-qkv-blockdiag": ("FluxLoraLoaderMixin", FIRST),
    "kohya/flux-kohya-te1-invoke": ("FluxLoraLoaderMixin", r"_blocks_0_|layers_0_"),
    "diffusers/flux-diffusers-with-alpha-keys": ("FluxLoraLoaderMixin", FIRST),
    "xlabs/flux-xlabs-with-single": ("FluxLoraLoaderMixin", FIRST),
    "kohya/wan21-14b-i2v-musubi": ("WanLoraLoaderMixin", r"blocks_0_"),
    "ai-toolkit/wan21-14b-aitoolkit": ("WanLoraLoaderMixin", FIRST),
    "kohya/z-image-musubi": ("ZImageLoraLoaderMixin", FIRST),
    "comfy/z-image-musubi-comfy-qkv": ("ZImageLoraLoaderMixin", FIRST),
    "ai-toolkit/z-image-aitoolkit": ("ZImageLoraLoaderMixin", FIRST),
    "ai-toolkit/flux2-aitoolkit-bfl": ("Flux2LoraLoaderMixin", FIRST),
    "kohya/flux2-musubi": ("Flux2LoraLoaderMixin", FIRST),
    "comfy/hunyuanvideo-diffusion_model-AB": ("HunyuanVideoLoraLoaderMixin", FIRST),
    "comfy/ltx-video-comfy": ("LTXVideoLoraLoaderMixin", FIRST),
    "comfy/qwen-image-lightning-alpha": ("QwenImageLoraLoaderMixin", FIRST),
    "comfy/krea2-comfy-native": ("Krea2LoraLoaderMixin", FIRST),
}


def tensors_of(layout: Any, chosen: str) -> dict[str, Tensor]:
    header, values = header_of(layout), CorpusValues(layout)
    torch.manual_seed(0)
    found = {}
    for key, info in header.tensors.items():
        if not re.search(chosen, key):
            continue
        if key.endswith(".alpha"):
            found[key] = torch.tensor(values.scalar(info))
        else:
            found[key] = _blocks(layout, key, torch.randn(info.shape) * 0.05)
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


@pytest.mark.parametrize("name", sorted(CASES))
def test_deltas_are_those_of_diffusers(name: str, tmp_path: Path) -> None:
    from diffusers.loaders import lora_pipeline

    mixin, chosen = CASES[name]
    tensors = tensors_of(layouts()[name], chosen)
    assert len(tensors) >= 4
    save_file(tensors, tmp_path / "a.safetensors")
    ours = Adapter.open(tmp_path / "a.safetensors")
    extra: dict[str, Any] = {}
    if mixin.startswith("StableDiffusionXL"):
        extra["unet_config"] = SimpleNamespace(layers_per_block=2)
    if mixin.startswith("FluxLora"):
        extra["return_alphas"] = True
    told = getattr(lora_pipeline, mixin).lora_state_dict(
        {key: value.clone() for key, value in tensors.items()}, **extra
    )
    state, alphas = told if isinstance(told, tuple) else (told, None)
    downs = {
        key: value
        for key, value in state.items()
        if re.search(r"(lora_A|lora\.down|_lora\.down|lora_linear_layer\.down)\.weight$", key)
    }
    assert len(downs) == len(ours)
    probe = torch.Generator().manual_seed(1)
    compared = 0
    for path, factors in ours.items():
        stem = next(item for item in _names(path) if f"{item[0]}.{item[1]}.weight" in state)
        down, up = state[f"{stem[0]}.{stem[1]}.weight"], state[f"{stem[0]}.{stem[2]}.weight"]
        rank = down.shape[0]
        alpha = _alpha_of(stem[0], alphas or {}, rank)
        x = torch.randn(factors.A.shape[1], generator=probe)
        expected = alpha / rank * (up.reshape(len(up), rank) @ (down.reshape(rank, -1) @ x))
        found = factors.scaling * (factors.B @ (factors.A @ x))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        compared += 1
    assert compared == len(downs)


def _alpha_of(stem: str, alphas: dict[str, float], rank: int) -> float:
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
