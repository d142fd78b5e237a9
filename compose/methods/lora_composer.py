"""LoRA-Composer (arXiv:2403.11627): boxes with words and adapters of their own, and a latent that fills them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from artifacts.errors import ComposeRefused, FieldError
from compose.attention_maps import map_factor
from compose.box_losses import BoxedConcept, box_loss, moved_noise
from compose.isolation import Isolation
from compose.latent_update import UpdateTrace, rms, step_size
from compose.mask_pictures import mask_picture, overlay
from compose.mask_report import labels
from compose.options.lora_composer import LoraComposerOptions
from compose.output_masks import masked_outputs
from compose.places import box_mask
from compose.prompts import full_tokens, token_table
from compose.protocol import CompositionMethod, Denoised, Evidence
from compose.regional_attention import RegionalAttention
from compose.regions import Regions, resized
from compose.scene import Conditioning, check_finite, summed_weights
from compose.schedulers import history_warning

if TYPE_CHECKING:
    from PIL.Image import Image

    from compose.scene import Scene

_WORD_OUTPUT = "attn2.to_out.0"


class LoraComposer(CompositionMethod):
    """One pass for all: outside the boxes the base reads the plain prompt, inside each the concept's adapter reads its
    own words. Before the first steps' predictions z ← z − η·∂L/∂z with the losses of `compose.box_losses`."""

    words: Conditioning
    attention: RegionalAttention
    isolation: Isolation
    boxed: list[BoxedConcept]
    masks: Tensor

    def __init__(self, scene: Scene, stack: ExitStack) -> None:
        super().__init__(scene, stack)
        if not isinstance(scene.options, LoraComposerOptions):
            raise TypeError("these are no options of LoRA-Composer")
        self.options = scene.options
        self.names = labels([concept.noun for concept in scene.request.concepts])
        self.factor = map_factor(scene.loaded.unet, self.options.map_grid)
        self.updating = self.options.latent_update
        self.trace: list[UpdateTrace] = []
        self.windows: list[tuple[int, int]] = []

    @staticmethod
    def size_multiple(options: Any, unet: Any) -> int:
        return map_factor(unet, options.map_grid)

    def prepare(self) -> None:
        scene, options = self.scene, self.options
        unet, size = scene.loaded.unet, scene.latent_size
        self.masks = torch.stack([box_mask(box, size) for box in options.boxes or ()]).to(scene.loaded.device)
        prompts, pointers = self._prompts()
        self.boxed = self._boxed(prompts, pointers)
        self.words = scene.encode_one(scene.prompts.plain, scene.request.negative_prompt, scene.style_weights)
        regions = self._regions(prompts, pointers)
        every = options.adapted_layers == "all"
        self.stack.enter_context(
            masked_outputs(unet, regions, size, acts=lambda path: every or path.endswith(_WORD_OUTPUT))
        )
        self.attention = RegionalAttention(unet, regions, size, self.factor)
        self.isolation = Isolation(unet, self.masks, self.factor, isolating=options.isolate)
        self.stack.enter_context(self.attention.installed())
        self.stack.enter_context(self.isolation.installed())
        scene.loaded.activate_unet(dict.fromkeys(regions.names, 1.0))
        warning = history_warning(scene.schedule) if options.latent_update else None
        scene.warnings += [] if warning is None else [warning]

    def _prompts(self) -> tuple[list[str], list[str]]:
        given = self.options.region_prompts
        if given is not None:
            return list(given), [f"/parameters/region_prompts/{index}" for index in range(len(given))]
        prompts = list(self.scene.prompts.single)
        return prompts, ["/prompt"] * len(prompts)

    def _tokens(self, prompts: list[str], pointers: list[str]) -> Sequence[tuple[int, ...]]:
        """Of each concept in its own prompt. Raises ComposeRefused."""
        scene, concepts = self.scene, self.scene.request.concepts
        tokenizer, limit = scene.loaded.pipeline.tokenizer, scene.token_limit
        if self.options.region_prompts is None:  # every prompt has every noun, of which some may be equal
            everywhere = [scene.prompts.plain, *prompts]
            return token_table(tokenizer, everywhere, concepts, ["/prompt"] * len(everywhere), limit).mask_tokens[1:]
        return [
            full_tokens(tokenizer, prompt, [concept], pointer, limit)[0]
            for prompt, concept, pointer in zip(prompts, concepts, pointers, strict=True)
        ]

    def _boxed(self, prompts: list[str], pointers: list[str]) -> list[BoxedConcept]:
        """Raises ComposeRefused when a box has no cell of the maps, or a prompt not its concept's words."""
        scene = self.scene
        rows, columns = (side // self.factor for side in scene.latent_size)
        found = []
        for index, tokens in enumerate(self._tokens(prompts, pointers)):
            mask = resized(self.masks[index : index + 1], (rows, columns))[0]
            if not bool(mask.any()):
                pointer = f"/parameters/boxes/{index}"
                message = f"covers no cell of the attention maps, which have {columns}×{rows}; make it larger"
                raise ComposeRefused(f"Box {index + 1} {message}.", errors=[FieldError(pointer, message)])
            found.append(BoxedConcept(mask, tokens))
        return found

    def _regions(self, prompts: list[str], pointers: list[str]) -> Regions:
        """The first is whatever no box has; boxes that meet share alike."""
        scene = self.scene
        meeting = self.masks.sum(dim=0, keepdim=True)
        shares = torch.cat([(meeting == 0).float(), self.masks / meeting.clamp_min(1)])
        adapters, words = [scene.style_weights], [self.words]
        for index, (prompt, pointer) in enumerate(zip(prompts, pointers, strict=True)):
            own = summed_weights(scene.concept_weights(index), scene.style_weights)
            in_text = own if self.options.use_text_encoder_lora else scene.style_weights
            adapters.append(own)
            words.append(scene.encode_one(prompt, scene.request.negative_prompt, in_text, pointer))
        return Regions(shares, adapters, words)

    def start(self, latents: Tensor) -> Tensor:
        if not self.options.reinitialise:
            return latents
        maps, _ = self._seen(latents, self.scene.schedule.timesteps[0])
        moved, self.windows = moved_noise(latents, maps, self.boxed, self.factor)
        return moved

    def _seen(self, latents: Tensor, timestep: Tensor) -> tuple[list[Tensor], Tensor]:
        """Each concept's map, (h·w, tokens), and the map of self-attention, by a pass that ends after the last."""
        with self.attention.watching(stopping=True), self.isolation.watching():
            self.scene.forward(latents, timestep, self.words, conditional_only=True)
        return [item[-1] for item in self.attention.take()[1:]], self.isolation.take()[-1]

    def step(self, index: int, timestep: Tensor, latents: Tensor) -> Denoised:
        self.updating = self.updating and index < self.options.last_update(self.scene.steps)
        if self.updating:
            latents = self._moved(index, timestep, latents)
        return Denoised(self.scene.guide(self.scene.predict(latents, timestep, self.words)), latents)

    def loss(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """L at a latent, with a graph where gradients are on."""
        maps, self_map = self._seen(latents, timestep)
        return box_loss(maps, self_map, self.boxed, self.options)

    def _moved(self, index: int, timestep: Tensor, latents: Tensor) -> Tensor:
        with torch.enable_grad():
            z = latents.detach().requires_grad_(True)
            loss = self.loss(z, timestep)
            (gradient,) = torch.autograd.grad(loss, z)
        self.scene.passes.backward += 1
        check_finite(gradient, "The gradient of the latent", index)
        before = float(loss.detach())
        risen = bool(self.trace) and before > self.trace[-1].before
        eta = step_size(self.options.step_size, "sqrt_decay", index, self.scene.steps)
        change = eta * self.scene.schedule.update_factor(timestep) * gradient
        size = rms(latents)
        self.trace.append(
            UpdateTrace(index, 0, before, None, float(gradient.double().norm()), rms(change) / size if size else 0.0)
        )
        # this update is still made, as in the authors' code
        self.updating = not (risen and index >= self.options.stop_after)
        return latents - change

    def report(self) -> dict[str, Any]:
        shares = {name: float(mask.mean()) for name, mask in zip(self.names, self.masks, strict=True)}
        return {
            "map_grid": list(self.boxed[0].mask.shape),
            "coverage": [{"step": 0, **shares}],
            "windows": dict(zip(self.names, map(list, self.windows), strict=False)),
            "updates": [asdict(item) for item in self.trace],
        }

    def evidence(self, image: Image) -> Evidence:
        masks = self.masks.cpu()
        return Evidence(
            {name: [(0, mask_picture(mask, image.size))] for name, mask in zip(self.names, masks, strict=True)},
            {"overlay": overlay(image, list(masks))},
        )
