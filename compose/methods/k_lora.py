"""K-LoRA (arXiv:2502.18461): in every layer and step either the concept's adapter acts or the style's."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft.tuners.lora import LoraLayer
from torch import Tensor

from artifacts.errors import ComposeRefused, FieldError
from compose.adapter_switch import activate, tuner_layers
from compose.largest_entries import EntrySums, entry_sums
from compose.options.k_lora import KLoraOptions
from compose.protocol import CompositionMethod, Denoised
from compose.scene import Conditioning, summed_weights

if TYPE_CHECKING:
    from compose.scene import Scene


@dataclass(frozen=True, slots=True)
class _Scored:
    """A layer, and the sums of what either adapter adds to it."""

    layer: Any
    content: EntrySums
    style: EntrySums


class KLora(CompositionMethod):
    """With S the sum of the K largest |ΔW| of a layer, content acts in step i of T where
    S_c/γ > S_s·(α·i/T + β), else style.

    γ, the mean over layers of Σ|ΔW_c| / Σ|ΔW_s|, makes up for adapters of different size. Layers that one adapter does
    not have are the other's.
    """

    words: Conditioning

    def __init__(self, scene: Scene, stack: ExitStack) -> None:
        super().__init__(scene, stack)
        if not isinstance(scene.options, KLoraOptions):
            raise TypeError("these are no options of K-LoRA")
        self.options = scene.options
        self.layers: list[_Scored] = []
        self.gamma = 1.0
        self.chosen: list[list[bool]] = []

    def prepare(self) -> None:
        scene = self.scene
        both = summed_weights(scene.concept_weights(), scene.style_weights)
        self.words = scene.encode_one(
            scene.prompts.full, scene.request.negative_prompt, both if self.options.use_text_encoder_lora else {}
        )
        unet = scene.loaded.unet
        scene.loaded.activate_unet(both)
        paths = {id(module): path for path, module in unet.named_modules()}
        for layer in tuner_layers(unet):
            if any(name in layer.scaling for name in both):
                self.layers.append(self._scored(paths[id(layer)], layer))
        ratios = [item.content.all / item.style.all for item in self.layers if item.content.all and item.style.all]
        self.gamma = sum(ratios) / len(ratios) if ratios else 1.0

    def _scored(self, path: str, layer: Any) -> _Scored:
        scene = self.scene
        pairs = (scene.concepts[0], scene.request.concepts[0].weight), (scene.styles[0], scene.request.styles[0].weight)
        for (name, _), pointer in zip(pairs, ("/concepts/0/adapter", "/styles/0/adapter"), strict=True):
            if name in layer.scaling and not (isinstance(layer, LoraLayer) and name not in layer.lora_variant):
                detail = f"The adapter is no plain LoRA in {path}, so that its ΔW has no two factors to be scored by"
                raise ComposeRefused(f"{detail}.", errors=[FieldError(pointer, detail)])
        ranks = [layer.lora_A[name].weight.shape[0] for name, _ in pairs if name in layer.scaling]
        k = self.options.top_k or (ranks[0] * ranks[1] if len(ranks) > 1 else 1)
        content, style = (self._sums(layer, name, weight, k) for name, weight in pairs)
        return _Scored(layer, content, style)

    @staticmethod
    def _sums(layer: Any, name: str, weight: float, k: int) -> EntrySums:
        if name not in layer.scaling:
            return EntrySums(0.0, 0.0)
        layer.set_scale(name, weight)
        return entry_sums(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], k)

    def is_content(self, item: _Scored, progress: float) -> bool:
        """Whether the concept's adapter acts in a layer; progress is i/T."""
        favour = self.options.alpha * progress + self.options.beta
        return item.content.largest > self.gamma * item.style.largest * favour

    def step(self, index: int, timestep: Tensor, latents: Tensor) -> Denoised:
        scene = self.scene
        choice = [self.is_content(item, index / scene.steps) for item in self.layers]
        before = self.chosen[-1] if self.chosen else [None] * len(choice)
        for item, content, was in zip(self.layers, choice, before, strict=True):
            if content != was:
                activate(item.layer, scene.concept_weights(0) if content else scene.style_weights)
        self.chosen.append(choice)
        return Denoised(scene.guide(scene.predict(latents, timestep, self.words)), latents)

    def report(self) -> dict[str, Any]:
        return {
            "gamma": self.gamma,
            "layers": len(self.layers),
            "content_layers": [sum(choice) for choice in self.chosen],
        }
