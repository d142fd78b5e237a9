"""What a request ends with, before the decoder."""

from __future__ import annotations

from typing import Any

import torch

from compose.composition import Composition
from compose.engine import compose

SOFTMAX = 1e-4  # explicit softmax against the fused kernel, over several steps


def final_latents(request: Any, pipelines: Any, **options: Any) -> torch.Tensor:
    """The latent at the end."""
    return made(request, pipelines, **options)[1]


def made(request: Any, pipelines: Any, **options: Any) -> tuple[Composition, torch.Tensor]:
    """The composition, and the latent that it was decoded from."""
    seen: list[torch.Tensor] = []
    loaded = pipelines.get(request.base)
    decoder = loaded.pipeline.vae.decode

    def decode(z: torch.Tensor, **kwargs: Any) -> Any:
        seen.append(z * loaded.pipeline.vae.config.scaling_factor)
        return decoder(z, **kwargs)

    loaded.pipeline.vae.decode = decode
    try:
        found = compose(request, pipelines, **options)
    finally:
        del loaded.pipeline.vae.decode
    return found, seen[-1]


def same(one: torch.Tensor, two: torch.Tensor) -> None:
    """Equal but for rounding."""
    torch.testing.assert_close(one, two, atol=SOFTMAX, rtol=0)
