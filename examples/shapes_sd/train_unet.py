"""Trains ShapesSD's UNet, with the attention of words held to the shapes that they name; part of train_base."""

from __future__ import annotations

import copy
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from compose.attention_maps import MapRecorder, map_factor
from examples.shapes_sd.drawing import Shape, caption, draw, random_shapes
from examples.shapes_sd.train_text import nouns, token_ids
from examples.shapes_sd.train_vae import to_pixels

POOL = 12288
RATE, TEXT_RATE, WARM_UP, EMA = 1.5e-3, 0.2, 60, 0.997
SUPERVISION = 0.1
CAPTION_DROPOUT = 0.1
TIME_BIAS = 0.6
"""t = 1000·u^0.6 for uniform u: where things are and what colour they have is decided in much noise."""
GRID = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """How long, how much at once, and where it is kept.

    Attributes:
        batch: of one process.
        rank, world: of this process, and how many there are.
    """

    folder: Path
    steps: int
    batch: int
    rank: int = 0
    world: int = 1
    save_every: int = 200


def make_unet() -> UNet2DConditionModel:
    """1.08 million weights; cross-attention at 16×16 and 8×8."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=64,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def make_scheduler() -> DDIMScheduler:
    """The noise of Stable Diffusion, with velocity as what is predicted (arXiv:2202.00512)."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


@dataclass(slots=True)
class Pool:
    """Pictures as the VAE sees them.

    Attributes:
        mean, deviation: (n, 4, 16, 16), scaled.
    """

    scenes: list[list[Shape]]
    mean: Tensor
    deviation: Tensor


@torch.no_grad()
def make_pool(vae: AutoencoderKL, count: int = POOL) -> Pool:
    """The same for every process."""
    random = np.random.default_rng(2)
    scenes = [random_shapes(random) for _ in range(count)]
    means, deviations = [], []
    for start in range(0, count, 256):
        batch = to_pixels(np.stack([draw(scene) for scene in scenes[start : start + 256]]))
        found = vae.encode(batch).latent_dist
        means.append(found.mean * vae.config.scaling_factor)
        deviations.append(found.std * vae.config.scaling_factor)
    return Pool(scenes, torch.cat(means), torch.cat(deviations))


@dataclass(frozen=True, slots=True)
class Supervised:
    """Tokens whose place is known.

    Attributes:
        rows, tokens: (m,) where they are in the batch and the caption.
        masks: (m, 256) of their shapes, each of sum 1.
    """

    rows: Tensor
    tokens: Tensor
    masks: Tensor


def supervised_tokens(scenes: list[list[Shape]], captions: list[str]) -> Supervised:
    """Every noun, and the word before it; none of an empty caption."""
    rows, tokens, masks = [], [], []
    for row, (scene, text) in enumerate(zip(scenes, captions, strict=True)):
        for place, noun, word in nouns(text):
            shape = next(shape for shape in scene if shape.kind == noun)
            coarse = shape.mask().reshape(GRID, 2, GRID, 2).mean(axis=(1, 3)).reshape(-1)
            for token in (place, place - 1) if word else (place,):
                rows.append(row)
                tokens.append(token)
                masks.append(coarse / coarse.sum())
    found = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, GRID * GRID)
    return Supervised(torch.tensor(rows, dtype=torch.long), torch.tensor(tokens, dtype=torch.long), found)


def map_loss(maps: Tensor, wanted: Supervised) -> Tensor:
    """Mean of KL(q‖p); p is a token's map and q its shape's mask, each of sum 1 over the cells.

    The logarithm of the attention inside the mask alone would do for the place, but leaves a spike in the middle.

    Args:
        maps: (rows, cells, tokens).
    """
    if not len(wanted.rows):
        return maps.new_zeros(())
    chosen = maps[wanted.rows, :, wanted.tokens]
    logs = (chosen / chosen.sum(1, keepdim=True)).clamp(min=1e-8).log()
    q = wanted.masks
    return (q * (q.clamp(min=1e-8).log() - logs)).sum(1).mean()


class Trainer:
    """UNet and text encoder, their average, and the optimiser; everything that `save` keeps."""

    def __init__(self, plan: Plan, tokenizer: CLIPTokenizer, encoder: CLIPTextModel, pool: Pool) -> None:
        torch.manual_seed(3)
        self.plan, self.tokenizer, self.encoder, self.pool = plan, tokenizer, encoder, pool
        self.unet = make_unet()
        self.alphas = make_scheduler().alphas_cumprod
        self.modules = torch.nn.ModuleDict({"unet": self.unet, "text_encoder": encoder})
        self.parameters = [item for item in self.modules.parameters() if item.requires_grad]
        self.average = copy.deepcopy(self.modules).requires_grad_(False)
        groups = [
            {"params": list(self.unet.parameters())},
            {"params": list(encoder.parameters())},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.0)
        self.step = 0

    def run(self) -> None:
        """To the last step, from wherever a run before has come."""
        self._resume()
        recorder = MapRecorder(self.unet, map_factor(self.unet), (GRID, GRID))
        started, said = time.perf_counter(), np.zeros(3)
        with recorder.installed():
            while self.step < self.plan.steps:
                said += self._step(recorder)
                self.step += 1
                if self.step % 50 == 0 and self.plan.rank == 0:
                    loss, divergence, norm = said / 50
                    seconds = time.perf_counter() - started
                    print(f"step {self.step} v {loss:.4f} kl {divergence:.4f} norm {norm:.3f} {seconds:.0f} s")
                if self.step % 50 == 0:
                    said[:] = 0
                if self.step % self.plan.save_every == 0 or self.step == self.plan.steps:
                    self._save()

    def _step(self, recorder: MapRecorder) -> np.ndarray:
        """v-loss, divergence of the maps, norm of the gradient."""
        plan = self.plan
        random = np.random.default_rng([4, self.step, plan.rank])
        torch.manual_seed(self.step * plan.world + plan.rank)
        chosen = random.integers(0, len(self.pool.scenes), plan.batch)
        scenes = [self.pool.scenes[int(index)] for index in chosen]
        captions = [caption(random, scene) if random.random() >= CAPTION_DROPOUT else "" for scene in scenes]
        rows = torch.from_numpy(chosen)
        clean = self.pool.mean[rows] + self.pool.deviation[rows] * torch.randn(plan.batch, 4, GRID, GRID)
        noise = torch.randn_like(clean)
        level = (1000 * torch.rand(plan.batch) ** TIME_BIAS).long().clamp(max=999)
        alpha = self.alphas[level].view(-1, 1, 1, 1)
        noisy, target = (
            alpha.sqrt() * clean + (1 - alpha).sqrt() * noise,
            alpha.sqrt() * noise - (1 - alpha).sqrt() * clean,
        )
        context = self.encoder(token_ids(self.tokenizer, captions)).last_hidden_state
        with recorder.watching():
            predicted = self.unet(noisy, level, encoder_hidden_states=context).sample
            maps = recorder.take()
        loss = (predicted - target).square().mean()
        divergence = map_loss(maps, supervised_tokens(scenes, captions))
        self.optimizer.zero_grad()
        (loss + SUPERVISION * divergence).backward()
        self._share_gradient()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._set_rates()
        self.optimizer.step()
        self._update_average()
        return np.array([loss.item(), divergence.item(), norm.item()])

    def _share_gradient(self) -> None:
        """The mean over the processes, in one message."""
        if self.plan.world == 1:
            return
        given = [item for item in self.parameters if item.grad is not None]
        flat = torch.cat([item.grad.reshape(-1) for item in given]) / self.plan.world
        dist.all_reduce(flat)
        for item, part in zip(given, flat.split([item.numel() for item in given]), strict=True):
            item.grad.copy_(part.view_as(item))

    def _set_rates(self) -> None:
        done = self.step / self.plan.steps
        share = min(1.0, (self.step + 1) / WARM_UP) * (0.505 + 0.495 * math.cos(math.pi * done))
        for group, base in zip(self.optimizer.param_groups, (RATE, RATE * TEXT_RATE), strict=True):
            group["lr"] = base * share

    @torch.no_grad()
    def _update_average(self) -> None:
        kept = min(EMA, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.modules.parameters()), 1 - kept)

    @property
    def _state(self) -> Path:
        return self.plan.folder / "training.pt"

    def _save(self) -> None:
        if self.plan.rank:
            return
        state = {
            "step": self.step,
            "modules": self.modules.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        new = self._state.with_suffix(".new")
        torch.save(state, new)
        new.replace(self._state)

    def _resume(self) -> None:
        if not self._state.is_file():
            return
        state: dict[str, Any] = torch.load(self._state, weights_only=True)
        self.step = state["step"]
        self.modules.load_state_dict(state["modules"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])


def join(rank: int, world: int, port: int) -> None:
    """Meet the other processes on this machine."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
