"""OMG (arXiv:2403.10983) with masks of the user's: noise of the base, and of each concept inside its mask."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import Tensor

from compose.branches import Branch, Branches
from compose.fusion import fuse
from compose.mask_pictures import mask_picture, overlay
from compose.mask_report import labels
from compose.options.omg import OmgOptions
from compose.places import blend_weights, place_mask
from compose.protocol import CompositionMethod, Denoised, Evidence
from compose.scene import summed_weights

if TYPE_CHECKING:
    from PIL.Image import Image

    from compose.scene import Scene


class Omg(CompositionMethod):
    """ε = ε_base outside all masks, (1 − ρ)·ε_base + ρ·ε_i inside mask i, for both halves of the guidance.

    ε_base is the base model's under the plain prompt, ε_i that of concept i's adapter alone under its own prompt; all
    start from one noise. The authors find masks with a detector and a segmenter on the base's picture (stage 1); here
    they are given.
    """

    base: Branches
    branches: Branches

    def __init__(self, scene: Scene, stack: ExitStack) -> None:
        super().__init__(scene, stack)
        if not isinstance(scene.options, OmgOptions):
            raise TypeError("these are no options of OMG")
        self.options = scene.options
        self.names = labels([concept.noun for concept in scene.request.concepts])
        self.masks: list[Tensor] = []

    def prepare(self) -> None:
        scene, options = self.scene, self.options
        negative = scene.request.negative_prompt
        plain = Branch(scene.style_weights, scene.encode_one(scene.prompts.plain, negative, scene.style_weights))
        self.base = Branches(scene, [plain])
        if options.stage == "base":
            return
        self.masks = [
            place_mask(place, scene.latent_size, f"/parameters/places/{index}")
            for index, place in enumerate(options.places or ())
        ]
        self.weights = blend_weights(self.masks, options.rho).to(scene.loaded.device)
        concepts = [self._concept(index) for index in range(len(scene.concepts))]
        self.branches = Branches(scene, [plain, *concepts], together=options.batch_branches == "auto")
        self.stack.enter_context(self.branches.installed())

    def _concept(self, index: int) -> Branch:
        scene, given = self.scene, self.options.region_prompts
        prompt = scene.prompts.single[index] if given is None else given[index]
        pointer = "/prompt" if given is None else f"/parameters/region_prompts/{index}"
        adapters = summed_weights(scene.concept_weights(index), scene.style_weights)
        in_text = adapters if self.options.use_text_encoder_lora else scene.style_weights
        return Branch(adapters, scene.encode_one(prompt, scene.request.negative_prompt, in_text, pointer))

    def step(self, index: int, timestep: Tensor, latents: Tensor) -> Denoised:
        if self.options.stage == "base" or index < self.options.base_steps or not self.options.rho:
            return Denoised(self.scene.guide(self.base.predictions(latents, timestep).predictions[0]), latents)
        seen = self.branches.predictions(latents, timestep)
        return Denoised(self.scene.guide(fuse(seen.predictions, self.weights)), latents)

    def report(self) -> dict[str, Any]:
        if not self.masks:
            return {"stage": self.options.stage}
        shares = {name: float(mask.mean()) for name, mask in zip(self.names, self.masks, strict=True)}
        return {
            "stage": self.options.stage,
            "branches": len(self.branches),
            "batched": self.branches.together,
            "coverage": [{"step": 0, **shares}],
        }

    def evidence(self, image: Image) -> Evidence:
        if not self.masks:
            return Evidence()
        pictures = {
            name: [(0, mask_picture(mask, image.size))] for name, mask in zip(self.names, self.masks, strict=True)
        }
        return Evidence(pictures, {"overlay": overlay(image, self.masks)})
