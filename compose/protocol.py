"""What a composition method is to the engine."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from compose.scene import Scene

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Denoised:
    """What a method makes of a step.

    Attributes:
        noise: (1, c, h, w), the guided prediction.
        latents: (1, c, h, w), from which the sampler goes on: as they were, or moved.
    """

    noise: Tensor
    latents: Tensor


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a method found out on the way.

    Attributes:
        masks: by concept, pairs of 0-based step and picture.
        pictures: others, by name.
    """

    masks: Mapping[str, list[tuple[int, Image]]] = field(default_factory=dict)
    pictures: Mapping[str, Image] = field(default_factory=dict)


class CompositionMethod:
    """A way to make one image of several adapters. Made for one request; everything runs without gradients unless a
    method turns them on. Adapters, processors and flags are put back by the engine.

    Attributes:
        stack: closed when the request ends, however it does.
    """

    def __init__(self, scene: Scene, stack: ExitStack) -> None:
        self.scene = scene
        self.stack = stack

    @staticmethod
    def size_multiple(options: Any, unet: Any) -> int:
        """Latent pixels that both sides must be a multiple of."""
        del options, unet
        return 1

    def prepare(self) -> None:
        """Encode prompts, make tables: whatever is done once."""

    def start(self, latents: Tensor) -> Tensor:
        """The latent to begin with, from the drawn noise (1, c, h, w), already scaled for the sampler."""
        return latents

    def step(self, index: int, timestep: Tensor, latents: Tensor) -> Denoised:
        """One step, 0-based."""
        raise TypeError(f"{type(self).__name__} makes no steps")

    def report(self) -> dict[str, Any]:
        """JSON, for the composition's report."""
        return {}

    def evidence(self, image: Image) -> Evidence:
        """Pictures; `image` is the finished one."""
        del image
        return Evidence()
