"""CLoRA without its latent update: one branch per concept, fused inside masks of their attention (arXiv:2403.19776)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import Tensor

from artifacts.errors import ComposeRefused, FieldError
from compose.attention_maps import MapRecorder, map_factor
from compose.branches import Branch, Branches, Seen
from compose.fusion import fuse
from compose.mask_pictures import mask_picture, overlay
from compose.mask_report import labels, lost_concepts, lost_warnings
from compose.masks import branch_masks, coverage, even_weights, mask_weights
from compose.options.clora import CloraMaskOnlyOptions
from compose.prompts import TokenTable, token_table
from compose.protocol import CompositionMethod, Denoised, Evidence
from compose.scene import PromptPair, summed_weights

if TYPE_CHECKING:
    from PIL.Image import Image

    from compose.scene import Scene


class CloraMaskOnly(CompositionMethod):
    """Branches of one latent: the base under the plain prompt, each concept's adapter under a prompt with its trigger.

    Each step: every branch predicts; cells where a concept's words attend make its mask; predictions are averaged with
    weights W_b = M_b / Σ M; what no mask covers follows the base.
    """

    branches: Branches
    table: TokenTable
    grid: tuple[int, int]

    def __init__(self, scene: Scene, stack: ExitStack) -> None:
        super().__init__(scene, stack)
        if not isinstance(scene.options, CloraMaskOnlyOptions):
            raise TypeError("these are no options of CLoRA")
        self.options = scene.options
        self.names = labels([concept.noun for concept in scene.request.concepts])
        self._masks: Tensor | None = None
        self._coverage: dict[int, list[float]] = {}
        self._kept: dict[int, Tensor] = {}

    @staticmethod
    def size_multiple(options: Any, unet: Any) -> int:
        return map_factor(unet, options.map_grid)

    def prepare(self) -> None:
        scene, options = self.scene, self.options
        factor = map_factor(scene.loaded.unet, options.map_grid)
        height, width = scene.latent_size
        self.grid = (height // factor, width // factor)
        recorder = MapRecorder(scene.loaded.unet, factor, self.grid)
        self.stack.enter_context(recorder.installed())
        prompts, pointers = self._prompts()
        self.table = self._without_base(
            token_table(scene.loaded.pipeline.tokenizer, prompts, scene.request.concepts, pointers, scene.token_limit)
        )
        self.branches = Branches(
            scene,
            self._branches(prompts, pointers),
            recorder,
            together=options.batch_branches == "auto",
            both_halves=options.compat == "official",
        )
        self.stack.enter_context(self.branches.installed())

    def _prompts(self) -> tuple[list[str], list[str]]:
        """Of every branch, with the base's first, and where each stands in the request."""
        given = self.options.branch_prompts
        if given is not None:
            self._check_nouns()
            return list(given), [f"/parameters/branch_prompts/{index}" for index in range(len(given))]
        prompts = [self.scene.prompts.plain, *self.scene.prompts.single]
        return prompts, ["/prompt"] * len(prompts)

    def _check_nouns(self) -> None:
        nouns = [concept.noun.lower() for concept in self.scene.request.concepts]
        for index, noun in enumerate(nouns):
            if noun in nouns[:index]:
                raise ComposeRefused(
                    f"Several concepts are called {noun!r}, and branch prompts do not tell which is which.",
                    hint="Give them nouns of their own, or leave branch_prompts out.",
                    errors=[FieldError(f"/concepts/{index}/noun", "is another concept's as well")],
                )

    def _without_base(self, table: TokenTable) -> TokenTable:
        if self.options.base_branch:
            return table
        return TokenTable(tuple(row[1:] for row in table.groups), table.mask_tokens[1:])

    def _branches(self, prompts: list[str], pointers: list[str]) -> list[Branch]:
        scene, options = self.scene, self.options
        negatives = options.branch_negative_prompts or [scene.request.negative_prompt] * len(prompts)
        own_negatives = options.branch_negative_prompts is not None
        adapters, in_text, words = [], [], []
        for index, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
            if index == 0 and not options.base_branch:
                continue
            own = scene.concept_weights(index - 1) if index else {}
            adapters.append(summed_weights(own, scene.style_weights))
            in_text.append(adapters[-1] if options.use_text_encoder_lora else scene.style_weights)
            where = f"/parameters/branch_negative_prompts/{index}" if own_negatives else "/negative_prompt"
            words.append(PromptPair(prompt, negative, pointers[index], where))
        return [Branch(*item) for item in zip(adapters, scene.encode_each(words, in_text), strict=True)]

    def step(self, index: int, timestep: Tensor, latents: Tensor) -> Denoised:
        moved, seen = self.moved(index, timestep, latents)
        if seen is None:
            seen = self.branches.predictions(moved, timestep, with_maps=self.watches(index))
        self.saw(index, seen)
        weights = self._weights(index, seen).to(moved.device)
        return Denoised(self.scene.guide(fuse(seen.predictions, weights)), moved)

    def moved(self, index: int, timestep: Tensor, latents: Tensor) -> tuple[Tensor, Seen | None]:
        """The latent that the step goes on from, and a pass to go on with if it shall not be made anew."""
        del index, timestep
        return latents, None

    def saw(self, index: int, seen: Seen) -> None:
        """What a subclass learns from the pass that the step goes on with."""

    def watches(self, index: int) -> bool:
        """Whether the step's pass is to show its maps."""
        return self.makes_masks(index)

    def makes_masks(self, index: int) -> bool:
        """Whether a step has masks of its own."""
        frozen = self.options.freeze_mask_after
        late = frozen is not None and index > frozen and self._masks is not None
        return index >= self.options.apply_mask_after and not late

    def _weights(self, index: int, seen: Seen) -> Tensor:
        """(branches, 1, h, w) at the latent's size."""
        size = self.scene.latent_size
        if index < self.options.apply_mask_after:
            return even_weights(len(self.branches), size, seen.predictions[0].cond.device)
        if self.makes_masks(index):
            self._masks = branch_masks(seen.maps, self.table.mask_tokens, self.grid, self.options)
        if self._masks is None:
            raise AssertionError("masks are made before they are kept")
        weights = mask_weights(self._masks, size, base_branch=self.options.base_branch)
        if index in self._noted:
            self._coverage[index] = coverage(weights)
            self._kept[index] = self._masks.cpu()
        return weights

    @property
    def _noted(self) -> set[int]:
        """The steps whose masks are kept: the first, at a quarter, at half, the last."""
        last = self.scene.steps - 1
        return {0, round(last / 4), round(last / 2), last}

    @property
    def _first_subject(self) -> int:
        return 1 if self.options.base_branch else 0

    def report(self) -> dict[str, Any]:
        covered = [
            {"step": step, **({"base": shares[0]} if self.options.base_branch else {}), **self._by_name(shares)}
            for step, shares in sorted(self._coverage.items())
        ]
        lost = lost_concepts(
            {
                name: [shares[self._first_subject + index] for shares in self._coverage.values()]
                for index, name in enumerate(self.names)
            }
        )
        self.scene.warnings += lost_warnings(lost)
        return {
            "branches": len(self.branches),
            "batched": self.branches.together,
            "map_grid": list(self.grid),
            "coverage": covered,
            "concept_lost": lost,
        }

    def _by_name(self, shares: list[float]) -> dict[str, float]:
        return dict(zip(self.names, shares[self._first_subject :], strict=True))

    def evidence(self, image: Image) -> Evidence:
        masks: dict[str, list[tuple[int, Image]]] = {
            name: [
                (step, mask_picture(kept[self._first_subject + index], image.size))
                for step, kept in sorted(self._kept.items())
            ]
            for index, name in enumerate(self.names)
        }
        if not self._kept:
            return Evidence(masks)
        final = self._kept[max(self._kept)][self._first_subject :]
        return Evidence(masks, {"overlay": overlay(image, list(final))})
