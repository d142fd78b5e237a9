"""Gradient fusion of Mix-of-Show (arXiv:2305.18292): one adapter that does to each concept's activations what its own
did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from artifacts.errors import ComposeRefused, FieldError
from compose.adapter_samples import sample_alone
from compose.fused_adapter import Factors, FusionMethod
from compose.fused_layer import LayerProblem, Truncation, truncated
from compose.options.fusion import GradientFusionOptions
from compose.output_masks import WORD_LAYERS

if TYPE_CHECKING:
    from compose.scene import Scene


class GradientFusion(FusionMethod):
    """Each adapter samples pictures alone; of what every adapted layer was given then, XᵢXᵢᵀ is kept. Each layer's D is
    solved for and stored as a truncated SVD. All columns of D are sums of those of the Bᵢ, so that the ranks together
    are enough.

    Keys and values of cross-attention are given words: of these the positive prompt's are kept.
    """

    def __init__(self, scene: Scene, stack: ExitStack) -> None:
        super().__init__(scene, stack)
        if not isinstance(scene.options, GradientFusionOptions):
            raise TypeError("these are no options of gradient fusion")
        self.options = scene.options
        self.layers = self._layers()
        self.problems = {path: LayerProblem.empty(*_sides(layer)) for path, layer in self.layers.items()}
        self.figures: dict[str, Any] = {}

    def _layers(self) -> dict[str, Any]:
        """By path, the layers that have any of the adapters. Raises ComposeRefused."""
        names = set(self.scene.concepts)
        found = {}
        for path, layer in self.scene.loaded.unet.named_modules():
            having = [name for name in names if name in getattr(layer, "scaling", ())]
            if not having:
                continue
            base = layer.get_base_layer()
            plain = isinstance(layer, LoraLayer) and not any(name in layer.lora_variant for name in having)
            flat = isinstance(base, nn.Linear) or tuple(getattr(base, "kernel_size", ())) == (1, 1)
            if not plain or not flat:
                kind = "no plain LoRA" if not plain else "one of a convolution of several pixels"
                detail = f"an adapter is {kind} in {path}"
                raise ComposeRefused(
                    f"Gradient fusion: {detail}.",
                    hint="Take LoRAs of linear layers.",
                    errors=[FieldError("/concepts", detail)],
                )
            found[path] = layer
        return found

    def total(self) -> int:
        steps = len(self.scene.schedule.timesteps)
        return len(self.scene.concepts) * self.options.samples * steps + len(self.layers)

    def fused(self, advance: Callable[[], None]) -> Factors:
        scene, given = self.scene, self.options.concept_prompts
        for index, name in enumerate(scene.concepts):
            prompt = scene.prompts.single[index] if given is None else given[index]
            pointer = "/prompt" if given is None else f"/parameters/concept_prompts/{index}"
            words = scene.encode_one(prompt, scene.request.negative_prompt, {}, pointer)
            weight = scene.request.concepts[index].weight
            with self._watched() as grams:
                sample_alone(scene, {name: weight}, words, self.options.samples, index * self.options.samples, advance)
            for path, layer in self.layers.items():
                self.problems[path].add(_delta(layer, name, weight), grams[path])
        return self._solved(advance)

    @contextmanager
    def _watched(self) -> Iterator[dict[str, Tensor]]:
        """By layer XXᵀ of all that it is given inside, in float64 on the CPU."""
        grams = {path: torch.zeros_like(problem.C) for path, problem in self.problems.items()}

        def watch(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                del module
                given = args[0].detach().double()
                if path.endswith(WORD_LAYERS):
                    given = given[-1:]  # the positive prompt's half
                if isinstance(self.layers[path].get_base_layer(), nn.Conv2d):
                    given = given.movedim(1, -1)
                rows = given.reshape(-1, given.shape[-1])
                grams[path] += (rows.T @ rows).cpu()

            return look

        with ExitStack() as stack:
            for path, layer in self.layers.items():
                stack.callback(layer.register_forward_pre_hook(watch(path)).remove)
            yield grams

    def _solved(self, advance: Callable[[], None]) -> Factors:
        options = self.options
        factors, errors, objectives = {}, [], torch.zeros(3, dtype=torch.float64)
        for path, layer in self.layers.items():
            problem = self.problems[path]
            if options.solver == "closed_form":
                D = problem.closed_form(options.ridge)
            else:
                word = path.endswith(WORD_LAYERS)
                D = problem.descended(options.word_iterations if word else options.place_iterations)
            cut = truncated(D, options.rank or self._ranks(layer))
            errors.append(cut.error)
            objectives += torch.tensor(
                [problem.objective(self._sum(layer)), problem.objective(D), problem.objective(cut.B @ cut.A)]
            )
            factors[path] = _shaped(layer, cut)
            advance()
        self.figures = {
            "objective": dict(zip(("weighted_sum", "fused", "stored"), objectives.tolist(), strict=True)),
            "truncation_error": {"mean": sum(errors) / len(errors), "largest": max(errors)},
        }
        return factors

    def _ranks(self, layer: Any) -> int:
        names = [name for name in self.scene.concepts if name in layer.scaling]
        return sum(len(layer.lora_A[name].weight) for name in names)

    def _sum(self, layer: Any) -> Tensor:
        """Σ wᵢ·ΔWᵢ, what a merge would have."""
        parts = zip(self.scene.concepts, self.scene.request.concepts, strict=True)
        return torch.stack([_delta(layer, name, concept.weight) for name, concept in parts]).sum(dim=0)

    def report(self) -> dict[str, Any]:
        return self.figures


def _sides(layer: Any) -> tuple[int, int]:
    """(d_out, d_in)."""
    weight = layer.get_base_layer().weight
    return weight.shape[0], weight[0].numel()


def _delta(layer: Any, name: str, weight: float) -> Tensor:
    """(d_out, d_in) in float64 on the CPU; zero where the layer does not have the adapter."""
    if name not in layer.scaling:
        return torch.zeros(_sides(layer), dtype=torch.float64)
    layer.set_scale(name, weight)
    up, down = layer.lora_B[name].weight, layer.lora_A[name].weight
    found: Tensor = layer.scaling[name] * (up.flatten(1).double() @ down.flatten(1).double())
    return found.cpu()


def _shaped(layer: Any, cut: Truncation) -> tuple[Tensor, Tensor]:
    pixels = layer.get_base_layer().weight.ndim == 4
    return (cut.A[..., None, None], cut.B[..., None, None]) if pixels else (cut.A, cut.B)
