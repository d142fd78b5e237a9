"""The safety checker of Stable Diffusion: whether a finished image shows what it shall not."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from artifacts.errors import ImageFlagged, RequestInvalid

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of the pictures that CLIP was trained on (arXiv:2103.00020), per channel."""


@dataclass(frozen=True, slots=True)
class SafetyChecker:
    """A StableDiffusionSafetyChecker of diffusers, on the CPU."""

    model: Any

    @classmethod
    def load(cls, folder: Path) -> SafetyChecker:
        """Read the folder `safety_checker` of a pipeline: its config.json and safetensors weights.

        Raises:
            RequestInvalid: it can not be loaded.
        """
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

        try:
            model = StableDiffusionSafetyChecker.from_pretrained(
                str(folder), use_safetensors=True, local_files_only=True, dtype=torch.float32
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise RequestInvalid(
                f"The safety checker in {folder} can not be loaded: {error}",
                hint="RANKWISE_SAFETY_CHECKER is the folder safety_checker of a Stable Diffusion pipeline; until it is "
                "there, no image is given out.",
            ) from error
        return cls(model.eval().requires_grad_(False))

    def flags(self, image: Image) -> bool:
        """Whether the checker takes offence."""
        with torch.no_grad():
            _, found = self.model(clip_input=self._pixels(image), images=torch.zeros(1, 1))
        return bool(found[0])

    def check(self, image: Image) -> None:
        """Raises ImageFlagged."""
        if self.flags(image):
            raise ImageFlagged(
                "The safety checker flagged the image; it is not given out.",
                hint="Take another seed or another prompt. Whoever runs the service sets RANKWISE_SAFETY_CHECKER.",
            )

    def _pixels(self, image: Image) -> Tensor:
        """(1, 3, side, side): the middle square of the image, as CLIP is given pictures."""
        from PIL import Image as Pictures

        side = int(self.model.config.vision_config.image_size)
        width, height = (side * length // min(image.size) for length in image.size)
        resized = image.convert("RGB").resize((width, height), Pictures.Resampling.BICUBIC)
        left, top = (width - side) // 2, (height - side) // 2
        cut = np.asarray(resized.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
        normal = (cut - np.array(MEAN, dtype=np.float32)) / np.array(DEVIATION, dtype=np.float32)
        return torch.from_numpy(normal).permute(2, 0, 1)[None]


@lru_cache(maxsize=1)
def loaded_checker(folder: Path) -> SafetyChecker:
    """The checker of a folder, which stays in memory. Raises as `SafetyChecker.load`."""
    return SafetyChecker.load(folder)
