"""Noise as a UNet of Stable Diffusion learns to predict it: levels, targets, weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from artifacts.errors import FieldError, RequestInvalid


class Target(NamedTuple):
    """What the UNet shall predict.

    Attributes:
        value: (rows, c, h, w).
        weight: (rows,) of the squared error.
    """

    value: Tensor
    weight: Tensor


class Draws(NamedTuple):
    """What chance decides for the rows of a batch.

    Attributes:
        latents: (rows, c, h, w) standard normal: which latents of an image's distribution are taken.
        noise: (rows, c, h, w) standard normal.
        offset: (rows, c, 1, 1) standard normal: of the noise of a whole channel.
        level: (rows,) of the noise, each as likely as another.
        caption: (rows,) in [0, 1): whether the caption is left out.
    """

    latents: Tensor
    noise: Tensor
    offset: Tensor
    level: Tensor
    caption: Tensor


def draws(seed: int, epoch: int, rows: Sequence[int], shape: tuple[int, int, int], levels: int) -> Draws:
    """The draws of each row by itself, on the CPU: whatever batch, rank or device a row is in, they are the same.

    Args:
        rows: their numbers.
        shape: (c, h, w) of the latents of one.
    """
    drawn = [_draws_of_row(np.random.default_rng((seed, epoch, row)), shape, levels) for row in rows]
    return Draws(*(torch.from_numpy(np.stack(column)) for column in zip(*drawn, strict=True)))


def _draws_of_row(generator: np.random.Generator, shape: tuple[int, int, int], levels: int) -> tuple[Any, ...]:
    normal = partial(generator.standard_normal, dtype=np.float32)
    return (
        normal(shape),
        normal(shape),
        normal((shape[0], 1, 1)),
        generator.integers(levels),
        generator.random(dtype=np.float32),
    )


@dataclass(frozen=True, slots=True)
class Noising:
    """The forward process x_t = √ᾱ_t·x + √(1 − ᾱ_t)·ε.

    Attributes:
        alphas: (levels,) ᾱ_t.
        prediction: "epsilon" (the target is ε) or "v-prediction" (√ᾱ_t·ε − √(1 − ᾱ_t)·x, arXiv:2202.00512).
    """

    alphas: Tensor
    prediction: str

    @property
    def levels(self) -> int:
        return len(self.alphas)

    def noised(self, latents: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, what shall be predicted) at the levels (rows,) of latents and noise, (rows, c, h, w) each."""
        alpha = self.alphas.to(latents.device)[level].view(-1, 1, 1, 1)
        kept, added = alpha.sqrt(), (1 - alpha).sqrt()
        target = noise if self.prediction == "epsilon" else kept * noise - added * latents
        return kept * latents + added * noise, target

    def weights(self, level: Tensor, gamma: float | None) -> Tensor:
        """min(SNR, γ)/SNR for ε, min(SNR, γ)/(SNR + 1) for v, with SNR = ᾱ/(1 − ᾱ) (arXiv:2303.09556, eq. 7); (rows,).

        Without γ, 1. So is the limit for ε at no signal at all.
        """
        if gamma is None:
            return torch.ones(len(level), device=level.device)
        alpha = self.alphas.to(level.device)[level]
        ratio = alpha / (1 - alpha)
        capped = ratio.clamp(max=gamma)
        if self.prediction == "epsilon":
            return torch.where(ratio > 0, capped / ratio.clamp(min=torch.finfo(ratio.dtype).tiny), 1.0)
        return capped / (ratio + 1)


def noising_of(config: Mapping[str, Any], asked: str) -> Noising:
    """The process of a pipeline's scheduler.

    Args:
        config: of the scheduler.
        asked: "auto", "epsilon" or "v-prediction".

    Raises:
        RequestInvalid: the scheduler's own prediction is another, and nothing else was asked for.
    """
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(dict(config))
    own = str(scheduler.config.prediction_type).replace("_", "-")
    prediction = own if asked == "auto" else asked
    if prediction not in ("epsilon", "v-prediction"):
        problem = f"the base model's scheduler predicts {own!r}; epsilon and v-prediction can be trained"
        raise RequestInvalid(f"T{problem[1:]}.", errors=[FieldError("/task/prediction", problem)])
    return Noising(scheduler.alphas_cumprod.to(torch.float32), prediction)
