"""Masked outputs (FreeFuse, arXiv:2510.23515): early attention makes masks, and each adapter keeps to its own."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compose.attention_maps import MapRecorder, map_factor
from compose.mask_pictures import mask_picture, overlay
from compose.mask_report import labels, lost_concepts, lost_warnings
from compose.masks import concept_masks
from compose.options.freefuse import FreefuseOptions
from compose.output_masks import masked_outputs
from compose.prompts import full_tokens
from compose.protocol import CompositionMethod, Denoised, Evidence
from compose.regional_attention import RegionalAttention
from compose.regions import Regions
from compose.scene import Conditioning, check_finite, summed_weights
from compose.schedulers import make_schedule

if TYPE_CHECKING:
    from PIL.Image import Image

    from compose.scene import Scene


class Freefuse(CompositionMethod):
    """h ← W·h + Σᵢ mᵢ(p)·wᵢ·sᵢ·BᵢAᵢ·h at every place p of every layer, under one prompt with all triggers.

    Keys and values of cross-attention have no place: each place attends to those that its own adapters make of words.
    Where no concept's mask is, the base and the styles act alone.
    """

    words: Conditioning
    recorder: MapRecorder
    looking: ExitStack
    tokens: tuple[tuple[int, ...], ...]
    grid: tuple[int, int]

    def __init__(self, scene: Scene, stack: ExitStack) -> None:
        super().__init__(scene, stack)
        if not isinstance(scene.options, FreefuseOptions):
            raise TypeError("these are no options of FreeFuse")
        self.options = scene.options
        self.names = labels([concept.noun for concept in scene.request.concepts])
        self.masks: Tensor | None = None
        self._maps: list[Tensor] = []

    @staticmethod
    def size_multiple(options: Any, unet: Any) -> int:
        return map_factor(unet, options.map_grid)

    def prepare(self) -> None:
        scene, request = self.scene, self.scene.request
        factor = map_factor(scene.loaded.unet, self.options.map_grid)
        height, width = scene.latent_size
        self.grid = (height // factor, width // factor)
        self.tokens = full_tokens(
            scene.loaded.pipeline.tokenizer, scene.prompts.full, request.concepts, "/prompt", scene.token_limit
        )
        self.words = self._encoded(scene.concept_weights())
        self.recorder = MapRecorder(scene.loaded.unet, factor, self.grid)
        self.looking = self.stack.enter_context(ExitStack())
        self.looking.enter_context(self.recorder.installed())
        base = self.options.masks_from == "base"
        scene.loaded.activate_unet(
            scene.style_weights if base else summed_weights(scene.concept_weights(), scene.style_weights)
        )

    def _encoded(self, concepts: dict[str, float]) -> Conditioning:
        scene = self.scene
        in_text = concepts if self.options.use_text_encoder_lora else {}
        return scene.encode_one(
            scene.prompts.full, scene.request.negative_prompt, summed_weights(in_text, scene.style_weights)
        )

    def start(self, latents: Tensor) -> Tensor:
        if not self.options.restart:
            return latents
        scene, request = self.scene, self.scene.request
        # a sampler of its own, which leaves the real one's memory and noise as they are
        schedule = make_schedule(
            scene.loaded.pipeline.scheduler,
            self.options.scheduler,
            request.steps,
            scene.loaded.device,
            torch.Generator().manual_seed(request.seed),
        )
        moved = latents
        for index, timestep in enumerate(schedule.timesteps[: self.options.mask_steps]):
            noise = self._looked(timestep, moved)
            check_finite(noise, "The prediction", index)
            moved = schedule.step(noise, timestep, moved)[0]
        self._part()
        return latents

    def step(self, index: int, timestep: Tensor, latents: Tensor) -> Denoised:
        if self.masks is not None:
            return Denoised(self.scene.guide(self.scene.predict(latents, timestep, self.words)), latents)
        noise = self._looked(timestep, latents)
        if index + 1 == self.options.mask_steps:
            self._part()
        return Denoised(noise, latents)

    def _looked(self, timestep: Tensor, latents: Tensor) -> Tensor:
        """A step's prediction by all adapters, whose maps are kept."""
        with self.recorder.watching():
            prediction = self.scene.predict(latents, timestep, self.words)
        self._maps.append(self.recorder.take()[-1])  # the last half is the positive prompt's
        return self.scene.guide(prediction)

    def _part(self) -> None:
        """From here on each adapter keeps to its mask."""
        self.looking.close()
        maps = torch.stack(self._maps).mean(dim=0)
        self.masks = concept_masks(maps, self.tokens, self.grid, self.options, disjoint=self.options.disjoint)
        self.keep_to(self.masks)

    def keep_to(self, masks: Tensor) -> None:
        """(concepts, h, w) of 0 and 1: every set of concepts that meets somewhere is a region of its own."""
        scene = self.scene
        sets, where = torch.unique(masks.flatten(1).T, dim=0, return_inverse=True)
        shares = torch.nn.functional.one_hot(where, len(sets)).T.reshape(-1, *masks.shape[1:]).float()
        present = [[index for index, inside in enumerate(row) if inside] for row in sets.tolist()]
        concepts = [scene.concept_weights(*indices) if indices else {} for indices in present]
        regions = Regions(
            shares,
            [summed_weights(item, scene.style_weights) for item in concepts],
            [self._encoded(item) for item in concepts],
        )
        unet = scene.loaded.unet
        self.stack.enter_context(masked_outputs(unet, regions, scene.latent_size))
        attention = RegionalAttention(unet, regions, scene.latent_size, self.recorder.factor)
        self.stack.enter_context(attention.installed())
        scene.loaded.activate_unet(dict.fromkeys(regions.names, 1.0))

    def _shares(self) -> dict[str, float]:
        masks = self.masks
        if masks is None:
            raise AssertionError("masks are made before they are told of")
        return dict(zip(self.names, (float(mask.mean()) for mask in masks), strict=True))

    def report(self) -> dict[str, Any]:
        shares = self._shares()
        lost = lost_concepts({name: [share] for name, share in shares.items()})
        self.scene.warnings += lost_warnings(lost)
        return {
            "map_grid": list(self.grid),
            "coverage": [{"step": self.options.mask_steps - 1, **shares}],
            "concept_lost": lost,
        }

    def evidence(self, image: Image) -> Evidence:
        if self.masks is None:
            return Evidence()
        masks = self.masks.cpu()
        step = self.options.mask_steps - 1
        return Evidence(
            {name: [(step, mask_picture(mask, image.size))] for name, mask in zip(self.names, masks, strict=True)},
            {"overlay": overlay(image, list(masks))},
        )
