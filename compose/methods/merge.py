"""The exact weighted sum: all adapters act at once."""

from __future__ import annotations

from torch import Tensor

from compose.protocol import CompositionMethod, Denoised
from compose.scene import Conditioning


class Merge(CompositionMethod):
    """W + Σ wᵢ·sᵢ·BᵢAᵢ in UNet and text encoders, under one prompt with all triggers.

    As diffusers' `set_adapters(names, weights)`; no factor is multiplied with another adapter's.
    """

    words: Conditioning

    def prepare(self) -> None:
        scene = self.scene
        weights = {**scene.concept_weights(), **scene.style_weights}
        self.words = scene.encode_one(scene.prompts.full, scene.request.negative_prompt, weights)
        scene.loaded.activate_unet(weights)

    def step(self, index: int, timestep: Tensor, latents: Tensor) -> Denoised:
        del index
        return Denoised(self.scene.guide(self.scene.predict(latents, timestep, self.words)), latents)
