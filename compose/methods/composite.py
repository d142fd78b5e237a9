"""LoRA-Composite (arXiv:2402.16843): the mean of the adapters' predictions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compose.branches import Branch, Branches
from compose.fusion import fuse
from compose.masks import even_weights
from compose.protocol import CompositionMethod, Denoised


class Composite(CompositionMethod):
    """ε_u and ε_c are means over passes with one adapter each, under one prompt that all adapters encode together."""

    branches: Branches

    def prepare(self) -> None:
        scene = self.scene
        words = scene.encode_one(
            scene.prompts.full, scene.request.negative_prompt, {**scene.concept_weights(), **scene.style_weights}
        )
        self.branches = Branches(
            scene,
            [
                Branch({**scene.style_weights, **scene.concept_weights(index)}, words)
                for index in range(len(scene.concepts))
            ],
        )
        self.stack.enter_context(self.branches.installed())

    def step(self, index: int, timestep: Tensor, latents: Tensor) -> Denoised:
        del index
        seen = self.branches.predictions(latents, timestep)
        weights = even_weights(len(self.branches), self.scene.latent_size, latents.device)
        return Denoised(self.scene.guide(fuse(seen.predictions, weights)), latents)

    def report(self) -> dict[str, Any]:
        return {"branches": len(self.branches), "batched": self.branches.together}
