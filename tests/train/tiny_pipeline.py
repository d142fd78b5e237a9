"""A random Stable Diffusion pipeline of a megabyte, and images with captions for it."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = ("a", "red", "blue", "square", "photo", "of")
RESOLUTION = 32


def write_tiny_pipeline(directory: Path, prediction: str = "epsilon") -> Path:
    """The same bytes every time; latents of 4×16×16 for images of 32×32."""
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in "abcdefghijklmnopqrstuvwxyz0123456789":
        for piece in (letter, f"{letter}</w>"):
            vocabulary[piece] = len(vocabulary)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            latent_channels=4,
            norm_num_groups=8,
            sample_size=RESOLUTION,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(vocabulary),
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=16,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDPMScheduler(num_train_timesteps=100, prediction_type=prediction, steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(directory)
    return directory


def picture(red: int, blue: int, size: tuple[int, int] = (40, 36), kind: str = "PNG") -> bytes:
    """A square of one colour on grey."""
    image = Image.new("RGB", size, (128, 128, 128))
    image.paste((red, 0, blue), (8, 8, 28, 28))
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def write_images(path: Path, count: int = 12, extra: dict[str, bytes] | None = None) -> Path:
    """Red and blue squares with captions in metadata.jsonl; `extra` files are added or take the place of others."""
    files: dict[str, bytes] = {}
    lines: list[dict[str, Any]] = []
    for number in range(count):
        red = number % 2 == 0
        name = f"pictures/{number:02d}.png"
        files[name] = picture(200 + number if red else 0, 0 if red else 200 + number)
        lines.append({"file_name": f"{number:02d}.png", "text": f"a {'red' if red else 'blue'} square"})
    files["pictures/metadata.jsonl"] = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (files | (extra or {})).items():
            archive.writestr(name, content)
    return path
