"""LoRA-Switch (arXiv:2402.16843): one adapter at a time, in turn."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compose.options.baselines import SwitchOptions
from compose.protocol import CompositionMethod, Denoised
from compose.scene import Conditioning


class Switch(CompositionMethod):
    """Step i has adapter ⌊i/τ⌋ mod k alone, under one prompt with all triggers, which the first adapter encodes."""

    words: Conditioning

    def prepare(self) -> None:
        scene = self.scene
        weights = {**scene.style_weights, **scene.concept_weights(0)}
        self.words = scene.encode_one(scene.prompts.full, scene.request.negative_prompt, weights)
        self.turns: list[int] = []

    def active(self, index: int) -> int:
        """The concept whose adapter acts in a step."""
        options = self.scene.options
        if not isinstance(options, SwitchOptions):
            raise TypeError("these are no options of LoRA-Switch")
        done = index if options.compat == "paper" else max(0, index - 1)
        return done // options.switch_steps % len(self.scene.concepts)

    def step(self, index: int, timestep: Tensor, latents: Tensor) -> Denoised:
        scene, turn = self.scene, self.active(index)
        self.turns.append(turn)
        scene.loaded.activate_unet({**scene.style_weights, **scene.concept_weights(turn)})
        return Denoised(scene.guide(scene.predict(latents, timestep, self.words)), latents)

    def report(self) -> dict[str, Any]:
        return {"turns": self.turns}
