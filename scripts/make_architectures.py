"""Writes artifacts/architectures/*.json.gz: the modules of the base models whose adapters arrive under other names.

    .venv/bin/python scripts/make_architectures.py

Every model is built on torch's meta device from its configuration, so no weight exists. A list maps the module paths of
diffusers or transformers to the shape of their weight; `native` maps the name that a module has in the model's first
implementation to the modules that hold it in diffusers: one, or several where a fused projection is split by rows.
A native name whose target does not exist in the model is an error of this script.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from native_names import ANIMA, CHROMA, FLUX, FLUX2, HUNYUAN, KREA2, LTX2, LUMINA2, NATIVE_SD3, WAN, ZIMAGE
from unet_names import motion, unet

FOLDER = Path(__file__).parent.parent / "artifacts" / "architectures"
SWAP = "swap"

_SD1 = {"cross_attention_dim": 768, "attention_head_dim": 8}
_SD2 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
_SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD3 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
_I2V = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
_HIDREAM = {
    "caption_channels": [4096, 4096],
    "llama_layers": list(range(32)) + [31] * 16,
    "patch_size": 2,
    "in_channels": 16,
}
_ANIMA = {"num_attention_heads": 16, "concat_padding_mask": True, "extra_pos_embed_type": None, "in_channels": 16}

DENOISERS: dict[str, tuple[str, str, str, dict[str, Any], Any]] = {
    # name: (title, component, class in diffusers, configuration, native names)
    "sd1": ("Stable Diffusion 1.x", "unet", "UNet2DConditionModel", _SD1, unet),
    "sd2": ("Stable Diffusion 2.x", "unet", "UNet2DConditionModel", _SD2, unet),
    "sdxl": ("Stable Diffusion XL", "unet", "UNet2DConditionModel", _SDXL, unet),
    "animatediff": ("AnimateDiff", "unet", "UNetMotionModel", {"cross_attention_dim": 768}, motion),
    "sd3": ("Stable Diffusion 3 medium", "transformer", "SD3Transformer2DModel", _SD3, NATIVE_SD3),
    "sd35-medium": (
        "Stable Diffusion 3.5 medium",
        "transformer",
        "SD3Transformer2DModel",
        {**_SD3, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm", "pos_embed_max_size": 384},
        NATIVE_SD3,
    ),
    "sd35-large": (
        "Stable Diffusion 3.5 large",
        "transformer",
        "SD3Transformer2DModel",
        {**_SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"},
        NATIVE_SD3,
    ),
    "flux": ("FLUX.1", "transformer", "FluxTransformer2DModel", {"guidance_embeds": True}, FLUX),
    "chroma": ("Chroma", "transformer", "ChromaTransformer2DModel", {}, CHROMA),
    "flux2": ("FLUX.2", "transformer", "Flux2Transformer2DModel", {}, FLUX2),
    "flux2-klein-4b": (
        "FLUX.2 klein 4B",
        "transformer",
        "Flux2Transformer2DModel",
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
        FLUX2,
    ),
    "flux2-klein-9b": (
        "FLUX.2 klein 9B",
        "transformer",
        "Flux2Transformer2DModel",
        {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
        FLUX2,
    ),
    "wan21-1.3b": (
        "Wan 2.1 1.3B",
        "transformer",
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
        WAN,
    ),
    "wan-14b": ("Wan 2.1 and 2.2 14B", "transformer", "WanTransformer3DModel", {}, WAN),
    "wan-14b-i2v": ("Wan 2.1 14B image to video", "transformer", "WanTransformer3DModel", _I2V, WAN),
    "wan22-5b": (
        "Wan 2.2 5B",
        "transformer",
        "WanTransformer3DModel",
        {"num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
        WAN,
    ),
    "qwen-image": ("Qwen-Image", "transformer", "QwenImageTransformer2DModel", {}, None),
    "hunyuan-video": ("HunyuanVideo", "transformer", "HunyuanVideoTransformer3DModel", {}, HUNYUAN),
    "framepack": (
        "FramePack",
        "transformer",
        "HunyuanVideoFramepackTransformer3DModel",
        {"has_image_proj": True, "has_clean_x_embedder": True},
        HUNYUAN,
    ),
    "z-image": ("Z-Image", "transformer", "ZImageTransformer2DModel", {}, ZIMAGE),
    "ltx-video": ("LTX-Video", "transformer", "LTXVideoTransformer3DModel", {}, None),
    "ltx-2": ("LTX-2", "transformer", "LTX2VideoTransformer3DModel", {}, LTX2),
    "lumina2": ("Lumina-Image 2", "transformer", "Lumina2Transformer2DModel", {"cap_feat_dim": 2304}, LUMINA2),
    "hidream": ("HiDream-I1", "transformer", "HiDreamImageTransformer2DModel", _HIDREAM, None),
    "auraflow": ("AuraFlow", "transformer", "AuraFlowTransformer2DModel", {}, None),
    "cogvideox-2b": ("CogVideoX 2B", "transformer", "CogVideoXTransformer3DModel", {}, None),
    "cogvideox-5b": (
        "CogVideoX 5B",
        "transformer",
        "CogVideoXTransformer3DModel",
        {"num_attention_heads": 48, "num_layers": 42},
        None,
    ),
    "cogview4": (
        "CogView 4",
        "transformer",
        "CogView4Transformer2DModel",
        {"num_attention_heads": 32, "attention_head_dim": 128, "num_layers": 28},
        None,
    ),
    "mochi": ("Mochi 1", "transformer", "MochiTransformer3DModel", {}, None),
    "sana": ("Sana 1.6B", "transformer", "SanaTransformer2DModel", {}, None),
    "pixart": (
        "PixArt-α and PixArt-Σ",
        "transformer",
        "PixArtTransformer2DModel",
        {"caption_channels": 4096, "norm_type": "ada_norm_single"},
        None,
    ),
    "krea2": ("Krea 2", "transformer", "Krea2Transformer2DModel", {}, KREA2),
    "anima": ("Anima", "transformer", "CosmosTransformer3DModel", _ANIMA, ANIMA),
}

_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_T5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
_QWEN3 = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}

TEXT_ENCODERS: dict[str, tuple[str, Any]] = {
    "clip-l": ("CLIP ViT-L/14", lambda: _clip(_CLIP_L, projection=768)),
    "clip-h": ("OpenCLIP ViT-H/14", lambda: _clip(_CLIP_H, projection=512)),
    "clip-bigg": ("OpenCLIP ViT-bigG/14", lambda: _clip(_CLIP_G, projection=1280)),
    "t5-xxl": (
        "T5 v1.1 XXL",
        lambda: transformers.T5EncoderModel(transformers.T5Config(**_T5, feed_forward_proj="gated-gelu")),
    ),
    "qwen3-0.6b": (
        "Qwen3 0.6B",
        lambda: transformers.Qwen3Model(transformers.Qwen3Config(**_QWEN3, num_key_value_heads=8, head_dim=128)),
    ),
}


def _clip(sizes: dict[str, int], projection: int) -> Any:
    config = transformers.CLIPTextConfig(**sizes, projection_dim=projection)
    return transformers.CLIPTextModelWithProjection(config)


def weights_of(model: torch.nn.Module) -> dict[str, list[int]]:
    """Module path → shape of its weight, of all modules that have one."""
    found = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if path and isinstance(weight, torch.Tensor):
            found[path] = list(weight.shape)
    return found


def native_of(rules: Any, modules: dict[str, list[int]]) -> dict[str, list[str]]:
    """Native name → targets; a rule is there only where all of its targets are, or where none of a block's are."""
    native: dict[str, list[str]] = {}
    for name, targets in _all(rules, modules):
        there = [target for target in targets if target == SWAP or target in modules]
        if len(there) == len(targets):
            if name in native and native[name] != list(targets):
                raise SystemExit(f"{name} has two meanings: {native[name]} and {targets}")
            native[name] = list(targets)
    return native


def _all(rules: Any, modules: dict[str, list[int]]) -> Iterator[tuple[str, list[str]]]:
    if rules is None:
        return
    yield from rules(modules)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, (title, component, kind, config, rules) in DENOISERS.items():
        with torch.device("meta"):
            model = getattr(diffusers, kind)(**config)
        modules = weights_of(model)
        _write(name, title, component, modules, native_of(rules, modules))
    for name, (title, build) in TEXT_ENCODERS.items():
        with torch.device("meta"):
            model = build()
        modules = weights_of(model)
        if name.startswith("clip") and not any(path.startswith("text_model.") for path in modules):
            # transformers 5 dropped a level that every stored file has
            modules = {path if path == "text_projection" else f"text_model.{path}": s for path, s in modules.items()}
        _write(name, title, "text_encoder", modules, {})


def _write(name: str, title: str, component: str, modules: dict[str, list[int]], native: dict[str, list[str]]) -> None:
    flat: dict[str, str] = {}
    for path in [*modules, *native]:
        other = flat.setdefault(path.replace(".", "_"), path)
        if native.get(path, [path]) != native.get(other, [other]):
            raise SystemExit(f"{name}: {other} and {path} flatten to one name")
    document = {"name": name, "title": title, "component": component, "modules": modules, "native": native}
    text = json.dumps(document, separators=(",", ":")).encode()
    (FOLDER / f"{name}.json.gz").write_bytes(gzip.compress(text, 9, mtime=0))
    covered = {target for targets in native.values() for target in targets}
    bare = [path for path, shape in modules.items() if len(shape) > 1 and path not in covered] if native else []
    sys.stdout.write(f"{name}: {len(modules)} modules, {len(native)} native names, {len(bare)} without one\n")


if __name__ == "__main__":
    main()
