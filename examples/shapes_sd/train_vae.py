"""Trains ShapesSD's VAE; part of train_base."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import mse_loss

from examples.shapes_sd.drawing import BACKGROUND, draw, random_shapes

STEPS, BATCH, RATE, KL = 2000, 16, 2e-3, 1e-4
POOL = 8192
DARK_SHARE = 0.2
"""Of pictures on another background than the base model draws: a VAE has seen more than its UNet has."""


def make_vae() -> AutoencoderKL:
    """Pictures of 32×32 to latents of 4×16×16 and back."""
    return AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )


def to_pixels(pictures: np.ndarray) -> Tensor:
    """(n, 32, 32, 3) in [0, 1] → (n, 3, 32, 32) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous() * 2 - 1


def pictures(random: np.random.Generator, count: int) -> np.ndarray:
    """(count, 32, 32, 3)."""
    grounds = np.where(random.random(count) < DARK_SHARE, random.uniform(0.15, 0.85, count), BACKGROUND)
    return np.stack([draw(random_shapes(random), float(ground)) for ground in grounds])


def train_vae(folder: Path) -> AutoencoderKL:
    """Written into `folder`, with the scaling factor in its configuration; read from there if it exists."""
    if (folder / "config.json").is_file():
        return AutoencoderKL.from_pretrained(folder)
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    pool = to_pixels(pictures(random, POOL))
    vae = make_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE, weight_decay=0.0)
    plan = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 50) * (0.51 + 0.49 * math.cos(math.pi * step / STEPS))
    )
    started = time.process_time()
    for step in range(STEPS):
        batch = pool[torch.from_numpy(random.integers(0, POOL, BATCH))]
        posterior = vae.encode(batch).latent_dist
        error = mse_loss(vae.decode(posterior.sample()).sample, batch)
        spread = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).sum(1).mean()
        optimizer.zero_grad()
        (error + KL * spread).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        plan.step()
        if step % 100 == 99:
            seconds = time.process_time() - started
            print(f"vae step {step + 1} mse {error.item():.5f} kl {spread.item():.3f} cpu {seconds:.0f} s", flush=True)
    with torch.no_grad():
        found = vae.encode(pool[:1024]).latent_dist
        vae.register_to_config(scaling_factor=float(1 / found.sample().std()))
        error = mse_loss(vae.decode(found.mode()).sample, pool[:1024])
    print(f"vae mse {error.item():.5f} scaling factor {vae.config.scaling_factor:.4f}", flush=True)
    vae.save_pretrained(folder)
    return vae


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_vae(Path(sys.argv[1]))
