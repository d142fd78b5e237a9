"""Random pipelines of a megabyte, SD and SDXL, and random LoRAs for them in both stored forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WORDS = ("a", "and", "circle", "square", "sks", "zwx")
TOKENS = 16
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def make_tokenizer() -> CLIPTokenizer:
    """Letters and some whole words; anything else falls into letters."""
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in "abcdefghijklmnopqrstuvwxyz0123456789,.":
        for piece in (letter, f"{letter}</w>"):
            vocabulary[piece] = len(vocabulary)
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pair = (pieces[-2], pieces[-1])  # from the end, so that no word's merge breaks another word
            if pair not in merges:
                merges.append(pair)
            pieces[-2:] = ["".join(pair)]
            vocabulary.setdefault(pieces[-1], len(vocabulary))
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )


def _text_config(size: int, vocabulary: int, **extra: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=size,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **extra,
    )


def make_unet(context: int, **extra: Any) -> UNet2DConditionModel:
    """Cross-attention at half of the latent's size, in down, mid and up blocks: four layers."""
    parts: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": context,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**parts, **extra})


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _wake(model: nn.Module) -> nn.Module:
    """Attention of a fresh model is all but uniform; larger keys and queries give the maps a shape."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn2.to_q" in name or "attn2.to_k" in name:
                parameter.mul_(4)
    return model


def write_sd(directory: Path) -> Path:
    """A StableDiffusionPipeline: latents of 4×16×16 for pictures of 32×32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = make_tokenizer()
        pipeline = StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=CLIPTextModel(_text_config(16, len(tokenizer))),
            tokenizer=tokenizer,
            unet=_wake(make_unet(16)),
            scheduler=_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(directory)
    return directory


def write_xl(directory: Path) -> Path:
    """A StableDiffusionXLPipeline: two text encoders, pooled embeddings, time ids."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tokenizer = make_tokenizer()
        pipeline = StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=CLIPTextModel(_text_config(16, len(tokenizer))),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(12, len(tokenizer), projection_dim=12)),
            tokenizer=tokenizer,
            tokenizer_2=make_tokenizer(),
            unet=_wake(
                make_unet(
                    28,
                    addition_embed_type="text_time",
                    addition_time_embed_dim=8,
                    projection_class_embeddings_input_dim=8 * 6 + 12,
                    use_linear_projection=True,
                )
            ),
            scheduler=_scheduler(),
            add_watermarker=False,
        )
    pipeline.save_pretrained(directory)
    return directory


def lora_tensors(model: nn.Module, seed: int, targets: tuple[str, ...], rank: int = 2) -> dict[str, torch.Tensor]:
    """Random A and B for every layer whose path ends so."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path.endswith(targets):
            found[f"{path}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator) * 0.2
            found[f"{path}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator) * 0.2
    return found


def write_diffusers_lora(directory: Path, pipeline: Any, seed: int, *, text: bool = False) -> Path:
    """One file with its configuration inside, as diffusers writes it."""
    parts = {"unet": (pipeline.unet, TARGETS)}
    if text:
        parts |= {
            name: (getattr(pipeline, name), ("q_proj", "v_proj"))
            for name in ("text_encoder", "text_encoder_2")
            if getattr(pipeline, name, None) is not None
        }
    state: dict[str, torch.Tensor] = {}
    config: dict[str, Any] = {}
    for index, (name, (model, targets)) in enumerate(parts.items()):
        state |= {f"{name}.{key}": value for key, value in lora_tensors(model, seed + 100 * index, targets).items()}
        fields = {"r": 2, "lora_alpha": 4, "target_modules": list(targets), "peft_type": "LORA", "bias": "none"}
        config |= {f"{name}.{key}": value for key, value in fields.items()}
    directory.mkdir(parents=True)
    save_file(
        state,
        directory / "pytorch_lora_weights.safetensors",
        {"format": "pt", "lora_adapter_metadata": json.dumps(config)},
    )
    return directory


def write_peft_lora(directory: Path, pipeline: Any, seed: int) -> Path:
    """A PEFT directory with the same tensors as the diffusers file of that seed."""
    tensors = lora_tensors(pipeline.unet, seed, TARGETS)
    directory.mkdir(parents=True)
    save_file(
        {f"base_model.model.{key}": value for key, value in tensors.items()},
        directory / "adapter_model.safetensors",
        {"format": "pt"},
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(TARGETS), "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory
