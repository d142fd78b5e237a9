"""Branches: one latent, several prompts, each with adapters of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compose.adapter_switch import AdapterSwitch, MixedBatch, can_mix, tuner_layers
from compose.attention_maps import MapRecorder
from compose.scene import Conditioning, Prediction, Scene


@dataclass(frozen=True, slots=True)
class Branch:
    """The UNet with these adapters, under these words."""

    adapters: Mapping[str, float]
    words: Conditioning


@dataclass(frozen=True, slots=True)
class Seen:
    """What one pass of all branches gives.

    Attributes:
        predictions: of each branch.
        maps: (h·w, tokens) of each branch; none where they were not asked for.
    """

    predictions: list[Prediction]
    maps: list[Tensor]


@dataclass(slots=True)
class Branches:
    """Runs branches, in `installed`: in one batch where each has one adapter at most, or one after another.

    Attributes:
        recorder: sees the maps; must be installed.
        both_halves: maps are averaged over the negative and the positive prompt, as the authors' code does it.
        switch: of the UNet's adapters.
    """

    scene: Scene
    branches: Sequence[Branch]
    recorder: MapRecorder | None = None
    together: bool = True
    both_halves: bool = False
    truncated: bool = True
    switch: AdapterSwitch = field(init=False, repr=False)
    mixed: MixedBatch = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # no adapter is loaded or unloaded while a request runs
        layers = tuner_layers(self.scene.loaded.unet)
        self.switch = AdapterSwitch(layers)
        self.mixed = MixedBatch(self.switch)
        self.together = (
            self.together and len(self.branches) > 1 and can_mix(layers, [branch.adapters for branch in self.branches])
        )

    def __len__(self) -> int:
        return len(self.branches)

    def installed(self) -> AbstractContextManager[None]:
        """As long as passes are made."""
        return self.mixed.installed() if self.together else nullcontext()

    def predictions(self, latents: Tensor, timestep: Tensor, *, with_maps: bool = False) -> Seen:
        """A whole pass of every branch."""
        halves = 2 if self.scene.guided else 1
        found, seen = self._run(range(len(self)), latents, timestep, conditional=halves == 1, maps=with_maps)
        predictions = [
            Prediction(rows[:1], rows[1:]) if halves == 2 else Prediction(None, rows) for rows in found.split(halves)
        ]
        return Seen(predictions, seen)

    def maps(self, indices: Sequence[int], latents: Tensor, timestep: Tensor) -> list[Tensor]:
        """The maps of some branches, (h·w, tokens) each, by passes that end after the last layer that has one."""
        both = self.both_halves and self.scene.guided
        _, seen = self._run(indices, latents, timestep, conditional=not both, maps=True, stopping=self.truncated)
        return seen

    def _run(
        self,
        indices: Sequence[int],
        latents: Tensor,
        timestep: Tensor,
        *,
        conditional: bool,
        maps: bool,
        stopping: bool = False,
    ) -> tuple[Any, list[Tensor]]:
        chunks = [list(indices)] if self.together and len(indices) > 1 else [[index] for index in indices]
        found, seen = [], []
        for chunk in chunks:
            result, chunk_maps = self._pass(chunk, latents, timestep, conditional, maps, stopping)
            found += [] if result is None else [result]
            seen += chunk_maps
        return (None if not found else found[0] if len(found) == 1 else torch.cat(found)), seen

    def _pass(
        self, chunk: list[int], latents: Tensor, timestep: Tensor, conditional: bool, maps: bool, stopping: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        scene, branches = self.scene, [self.branches[index] for index in chunk]
        halves = 1 if conditional else 2
        with ExitStack() as stack:
            if len(branches) == 1:
                self.switch.activate(branches[0].adapters)
            else:
                stack.enter_context(self.mixed.rows([branch.adapters for branch in branches], repeats=halves))
            if maps:
                if self.recorder is None:
                    raise AssertionError("there is nobody to look at the maps")
                stack.enter_context(self.recorder.watching(stopping=stopping))
            result = scene.forward(
                latents, timestep, [branch.words for branch in branches], conditional_only=conditional
            )
        if not maps or self.recorder is None:
            return result, []
        taken = self.recorder.take()
        rows = [taken[index * halves : (index + 1) * halves] for index in range(len(branches))]
        # the last half is the positive prompt's
        return result, [item.mean(dim=0) if self.both_halves else item[-1] for item in rows]
