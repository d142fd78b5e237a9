"""Latents that an adapter samples alone: what methods learn from that fuse adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from compose.scene import Conditioning, Scene, check_finite
from compose.schedulers import make_schedule


def sample_alone(
    scene: Scene,
    adapters: Mapping[str, float],
    words: Conditioning,
    count: int,
    offset: int,
    advance: Callable[[], None],
) -> list[Tensor]:
    """Clean latents, (1, c, h, w) each, sampled with these adapters in the UNet.

    Args:
        offset: of the seeds; two adapters with two offsets see different noise.
        advance: called after every step.
    """
    loaded, request = scene.loaded, scene.request
    loaded.activate_unet(adapters)
    found = []
    for number in range(count):
        generator = torch.Generator().manual_seed((request.seed + offset + number) % 2**63)
        schedule = make_schedule(
            loaded.pipeline.scheduler, scene.options.scheduler, request.steps, loaded.device, generator
        )
        scene.schedule = schedule  # whose scaling the UNet's input has
        noise = torch.randn(1, int(loaded.unet.config.in_channels), *scene.latent_size, generator=generator)
        latents = noise.to(loaded.device) * schedule.initial_sigma
        for index, timestep in enumerate(schedule.timesteps):
            prediction = scene.guide(scene.predict(latents, timestep, words))
            check_finite(prediction, "The prediction", index)
            latents = schedule.step(prediction, timestep, latents)[0]
            advance()
        found.append(latents)
    return found
