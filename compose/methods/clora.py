"""CLoRA (arXiv:2403.19776): masks as in `clora_mask_only`, on a latent that is moved until the concepts' maps part."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from artifacts.errors import ComposeRefused, FieldError
from artifacts.free_memory import free_memory
from compose.branches import Seen
from compose.contrastive_loss import class_vectors, contrastive_loss
from compose.graph_memory import GraphMeter
from compose.latent_update import Gradient, UpdateTrace, cached_gradient, joint_gradient, rms, step_size
from compose.methods.clora_mask_only import CloraMaskOnly
from compose.options.clora import CloraOptions
from compose.scene import check_finite
from compose.schedulers import history_warning

if TYPE_CHECKING:
    from compose.scene import Scene

MODERATE_MOVE = (0.005, 0.2)
"""Shares of the latent's RMS between which a first update is neither without effect nor destructive."""


class Clora(CloraMaskOnly):
    """Contrastive test-time composition.

    Before a step's prediction, in the first steps, z ← z − η·∂L/∂z with L the NT-Xent loss of all branches' maps; in
    some steps again and again.
    """

    options: CloraOptions

    def __init__(self, scene: Scene, stack: ExitStack) -> None:
        super().__init__(scene, stack)
        if not isinstance(scene.options, CloraOptions):
            raise TypeError("these are no options of CLoRA")
        self.trace: list[UpdateTrace] = []
        self.meter = GraphMeter(scene.loaded.unet)
        self._fits = False

    def prepare(self) -> None:
        super().prepare()
        lonely = [
            name
            for name, branches in zip(self.names, self.table.groups, strict=True)
            if sum(len(tokens) for tokens in branches) < 2
        ]
        if self.options.latent_update and lonely:
            raise ComposeRefused(
                f"The concept {lonely[0]!r} has one map only, so that there is nothing for it to agree with.",
                hint="Have a base branch, or turn latent_update off.",
                errors=[FieldError("/parameters/base_branch", "leaves a concept with one map")],
            )
        warning = history_warning(self.scene.schedule) if self.options.latent_update else None
        self.scene.warnings += [] if warning is None else [warning]
        if self.options.gradient_checkpointing:
            # the engine puts the flags back
            self.scene.loaded.unet.enable_gradient_checkpointing()
            self.branches.truncated = False

    @property
    def caching(self) -> bool:
        """Whether one branch's graph is held at a time: with auto until one was measured, and on unless all fit.

        Activations that are computed again must meet the adapters of their own branch, so that checkpointing needs it.
        """
        choice = self.options.gradient_caching
        return self.options.gradient_checkpointing or choice == "always" or (choice == "auto" and not self._fits)

    def moved(self, index: int, timestep: Tensor, latents: Tensor) -> tuple[Tensor, Seen | None]:
        seen = None
        for repeat in range(self.options.updates_in(index, self.scene.steps)):
            if self.options.compat == "official":
                # the authors' code goes on with what it saw before the last update
                seen = self.branches.predictions(latents, timestep, with_maps=True)
            latents = self._update(index, repeat, timestep, latents)
        return latents, seen

    def _update(self, index: int, repeat: int, timestep: Tensor, latents: Tensor) -> Tensor:
        options = self.options
        found = self._gradient(timestep, latents)
        check_finite(found.value, "The gradient of the latent", index)
        eta = step_size(options.step_size, options.step_schedule, index, self.scene.steps)
        change = eta * self.scene.schedule.update_factor(timestep) * found.value
        if repeat:
            self.trace[-1].after = found.loss
        size = rms(latents)
        moved = UpdateTrace(
            index, repeat, found.loss, None, float(found.value.double().norm()), rms(change) / size if size else 0.0
        )
        self.trace.append(moved)
        return latents - change

    def _gradient(self, timestep: Tensor, latents: Tensor) -> Gradient:
        branches, passes = self.branches, self.scene.passes
        samples = 2 if branches.both_halves and self.scene.guided else 1
        passes.backward += len(branches) * samples

        def maps_of(indices: Sequence[int], z: Tensor) -> list[Tensor]:
            return branches.maps(indices, z, timestep)

        if not self.caching:
            return joint_gradient(latents, len(branches), maps_of, self._loss)
        first = self.meter.bytes is None
        found = cached_gradient(latents, len(branches), self.meter.watched(maps_of), self._loss)
        if first:  # by now no graph is held, so that all that is free is free for them
            self._fits = self.meter.fits(len(branches), free_memory(str(self.scene.loaded.device)))
        return found

    def _loss(self, maps: Sequence[Tensor]) -> Tensor:
        vectors, labels = class_vectors(maps, self.table.groups)
        return contrastive_loss(vectors, labels, self.options.temperature)

    def watches(self, index: int) -> bool:
        # the pass that the step goes on with also tells what its last update did
        return super().watches(index) or bool(self.trace and self.trace[-1].step == index)

    def saw(self, index: int, seen: Seen) -> None:
        if seen.maps and self.trace and self.trace[-1].step == index and self.options.compat == "paper":
            self.trace[-1].after = float(self._loss(seen.maps))

    def report(self) -> dict[str, Any]:
        if self.trace and self.options.step_size:
            first = self.trace[0].moved
            if not MODERATE_MOVE[0] <= first <= MODERATE_MOVE[1]:
                self.scene.warnings.append(
                    f"The first update moved the latent by {first:.2%} of its size; 1 % to 10 % does best. Change "
                    "step_size."
                )
        return {
            **super().report(),
            "updates": [asdict(item) for item in self.trace],
            "gradient_caching": self.caching if self.trace else False,
            "graph_bytes": self.meter.bytes,
            "predictions": "stale" if self.trace and self.options.compat == "official" else "fresh",
        }
