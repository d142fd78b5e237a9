"""ZipLoRA (arXiv:2311.13600): a concept's and a style's adapter become one LoRA, by learnt vectors on their columns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from artifacts.errors import ComposeRefused, FieldError
from compose.adapter_samples import sample_alone
from compose.fused_adapter import Factors, FusionMethod
from compose.options.fusion import ZipLoraOptions
from compose.scene import Conditioning, check_finite
from compose.schedulers import make_schedule

if TYPE_CHECKING:
    from compose.scene import Scene

_PROBES = 8
"""Fixed noises and times by which the report compares before and after."""


@dataclass(slots=True)
class _Side:
    """One of both adapters: its name and weight, the words that it knows, and latents that it sampled."""

    name: str
    weight: float
    words: Conditioning
    latents: list[Tensor]


class ZipLora(FusionMethod):
    """min over m of ‖ε_m(x_c, p_c) − ε_c(x_c, p_c)‖² + ‖ε_m(x_s, p_s) − ε_s(x_s, p_s)‖² + λ·Σ_layers mean|m_c·m_s|.

    ε_m is the UNet with ΔW_c·diag(m_c) + ΔW_s·diag(m_s), ε_c and ε_s with one adapter alone. As diag acts on the input,
    B·A·diag(m) = B·(A·diag(m)): the sum is a plain LoRA of rank r_c + r_s.
    """

    def __init__(self, scene: Scene, stack: ExitStack) -> None:
        super().__init__(scene, stack)
        if not isinstance(scene.options, ZipLoraOptions):
            raise TypeError("these are no options of ZipLoRA")
        self.options = scene.options
        self.mergers: dict[tuple[str, str], Tensor] = {}
        self.merging = False
        self.figures: dict[str, Any] = {}
        self.layers = self._layers()
        self.sides: list[_Side] = []

    def _layers(self) -> dict[str, Any]:
        """By path, the layers that have either adapter. Raises ComposeRefused."""
        scene = self.scene
        names = (scene.concepts[0], scene.styles[0])
        if names[0] == names[1]:
            detail = "is the concept's adapter as well"
            raise ComposeRefused(
                f"The style's adapter {detail}: there is nothing to fuse.",
                errors=[FieldError("/styles/0/adapter", detail)],
            )
        found = {}
        for path, layer in scene.loaded.unet.named_modules():
            having = [name for name in names if name in getattr(layer, "scaling", ())]
            if not having:
                continue
            if not isinstance(layer, LoraLayer) or any(name in layer.lora_variant for name in having):
                detail = f"an adapter is no plain LoRA in {path}, so that its columns can not be weighed"
                raise ComposeRefused(f"ZipLoRA: {detail}.", errors=[FieldError("/concepts", detail)])
            found[path] = layer
        return found

    def total(self) -> int:
        return 2 * self.options.samples * len(self.scene.schedule.timesteps) + self.options.train_steps

    def fused(self, advance: Callable[[], None]) -> Factors:
        self.prepare(advance)
        before = self.probe()
        losses = self._trained(advance)
        self.figures = {
            "loss": {"first": losses[0], "last": losses[-1]},
            "error": {"before": before, "after": self.probe()},
            "similarity": float(self._similarity()),
        }
        return self.factors()

    def prepare(self, advance: Callable[[], None]) -> None:
        """Sample pictures with each adapter alone, and put vectors of ones on the columns of both."""
        scene, request, options = self.scene, self.scene.request, self.options
        style_prompt = scene.prompts.plain if options.style_prompt is None else options.style_prompt
        where = "/prompt" if options.style_prompt is None else "/parameters/style_prompt"
        parts = (
            (scene.concepts[0], request.concepts[0].weight, scene.prompts.full, "/prompt"),
            (scene.styles[0], request.styles[0].weight, style_prompt, where),
        )
        for number, (name, weight, prompt, pointer) in enumerate(parts):
            words = scene.encode_one(prompt, request.negative_prompt, {}, pointer)
            latents = sample_alone(scene, {name: weight}, words, options.samples, number * options.samples, advance)
            self.sides.append(_Side(name, weight, words, latents))
        # from here on latents are noised as in training, which is DDIM's scale
        scene.schedule = make_schedule(
            scene.loaded.pipeline.scheduler, "ddim", request.steps, scene.loaded.device, torch.Generator()
        )
        for path, layer in self.layers.items():
            for side in self.sides:
                if side.name in layer.scaling:
                    factor = layer.lora_A[side.name]
                    shape = (factor.weight.shape[1], *(1 for _ in factor.weight.shape[2:]))
                    self.mergers[path, side.name] = torch.ones(shape, device=factor.weight.device)
                    handle = factor.register_forward_pre_hook(self._weigh(path, side.name))
                    self.stack.callback(handle.remove)

    def _weigh(self, path: str, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        def weigh(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            del module
            return (args[0] * self.mergers[path, name].to(args[0].dtype), *args[1:]) if self.merging else None

        return weigh

    def _trained(self, advance: Callable[[], None]) -> list[float]:
        """The loss of every step."""
        for merger in self.mergers.values():
            merger.requires_grad_(True)
        optimizer = torch.optim.Adam(list(self.mergers.values()), lr=self.options.learning_rate)
        generator = torch.Generator().manual_seed(self.scene.request.seed)
        losses = []
        for step in range(self.options.train_steps):
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                error = torch.stack([self.error(side, generator) for side in self.sides]).sum()
                loss = error + self.options.similarity_weight * self._similarity()
            check_finite(loss, "The loss", step)
            loss.backward()  # type: ignore[no-untyped-call]
            self.scene.passes.backward += len(self.sides)
            optimizer.step()
            losses.append(float(loss.detach()))
            advance()
        for merger in self.mergers.values():
            merger.requires_grad_(False)
        return losses

    def error(self, side: _Side, generator: torch.Generator) -> Tensor:
        """Mean of (ε_m − ε_side)² at one of the side's latents, a random noise and a random time."""
        scene = self.scene
        choice = int(torch.randint(len(side.latents), (), generator=generator))
        scheduler = scene.schedule.scheduler
        timestep = torch.randint(int(scheduler.config.num_train_timesteps), (1,), generator=generator)
        clean = side.latents[choice]
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        noised = scheduler.add_noise(clean, noise, timestep.to(clean.device))
        at = timestep[0].to(clean.device)
        with torch.no_grad():
            target = self._predicted({side.name: side.weight}, noised, at, side.words, merging=False)
        both = {item.name: item.weight for item in self.sides}
        return functional.mse_loss(self._predicted(both, noised, at, side.words, merging=True), target)

    def _predicted(
        self, adapters: dict[str, float], latents: Tensor, timestep: Tensor, words: Conditioning, *, merging: bool
    ) -> Tensor:
        self.scene.loaded.activate_unet(adapters)
        self.merging = merging
        try:
            found = self.scene.forward(latents, timestep, words, conditional_only=True)
        finally:
            self.merging = False
        if found is None:
            raise AssertionError("a prediction needs the whole UNet")
        return found

    def _similarity(self) -> Tensor:
        """Σ over layers with both adapters of mean|m_c·m_s|."""
        content, style = self.sides
        terms = [
            (self.mergers[path, content.name] * self.mergers[path, style.name]).abs().mean()
            for path in self.layers
            if (path, content.name) in self.mergers and (path, style.name) in self.mergers
        ]
        return torch.stack(terms).sum() if terms else torch.zeros((), device=self.scene.loaded.device)

    def probe(self) -> dict[str, float]:
        """The mean error of either side at fixed noises and times."""
        found = {}
        for title, side in zip(("concept", "style"), self.sides, strict=True):
            generator = torch.Generator().manual_seed(self.scene.request.seed + 1)
            found[title] = sum(float(self.error(side, generator)) for _ in range(_PROBES)) / _PROBES
        return found

    def factors(self) -> Factors:
        """A = [A_c·diag(m_c); A_s·diag(m_s)], B = [w_c·s_c·B_c, w_s·s_s·B_s] of every layer."""
        found = {}
        for path, layer in self.layers.items():
            downs, ups = [], []
            for side in self.sides:
                if side.name in layer.scaling:
                    layer.set_scale(side.name, side.weight)
                    downs.append(layer.lora_A[side.name].weight.float() * self.mergers[path, side.name])
                    ups.append(layer.scaling[side.name] * layer.lora_B[side.name].weight.float())
            found[path] = (torch.cat(downs), torch.cat(ups, dim=1))
        return found

    def report(self) -> dict[str, Any]:
        return self.figures
