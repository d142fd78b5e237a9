"""One request on one pipeline: encoded words, calls of the UNet, and how many there were."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from artifacts.errors import CompositionDiverged
from compose.attention_maps import Stop
from compose.options.common import ComposeOptions
from compose.pipeline_facts import check_side
from compose.pipelines import LoadedPipeline
from compose.prompts import ScenePrompts, prompt_ids
from compose.request import CompositionRequest
from compose.schedulers import Schedule


@dataclass(slots=True)
class Passes:
    """What went through the UNet, in samples: guidance makes two of one.

    Attributes:
        full: forward passes to the end.
        truncated: forward passes that ended after the last map.
        backward: samples that a gradient went back through.
        seconds: of the forward passes.
    """

    full: int = 0
    truncated: int = 0
    backward: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class PromptPair:
    """What a branch is told.

    Attributes:
        pointer, negative_pointer: where the prompts stand in the request.
    """

    prompt: str
    negative: str
    pointer: str = "/prompt"
    negative_pointer: str = "/negative_prompt"

    @property
    def texts(self) -> tuple[tuple[str, str], ...]:
        """Both prompts, each with its place."""
        return (self.prompt, self.pointer), (self.negative, self.negative_pointer)


@dataclass(frozen=True, slots=True)
class Conditioning:
    """A branch's words.

    Attributes:
        context: (2, tokens, d), the negative prompt's first.
        pooled: (2, d) and time_ids: (2, 6) of SDXL.
    """

    context: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one branch: (1, c, h, w) each; `uncond` is None where guidance is off."""

    uncond: Tensor | None
    cond: Tensor


@dataclass(slots=True)
class Scene:
    """What a method works with.

    Attributes:
        prompts: the request's prompt in all its forms.
        concepts, styles: the adapters' names within the pipeline, in the request's order.
        height, width: pixels.
        warnings: whole sentences, for the report.
    """

    loaded: LoadedPipeline
    request: CompositionRequest
    options: ComposeOptions
    prompts: ScenePrompts
    schedule: Schedule
    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    height: int
    width: int
    passes: Passes = field(default_factory=Passes)
    warnings: list[str] = field(default_factory=list)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        # asked in every pass
        self.dtype = self.loaded.dtype

    @property
    def steps(self) -> int:
        return len(self.schedule.timesteps)

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w)."""
        return self.height // self.loaded.vae_factor, self.width // self.loaded.vae_factor

    @property
    def guided(self) -> bool:
        """Whether the unconditional half is computed."""
        return self.options.guidance_scale > 1

    @property
    def style_weights(self) -> dict[str, float]:
        """Every style adapter with its weight."""
        return {name: item.weight for name, item in zip(self.styles, self.request.styles, strict=True)}

    def concept_weights(self, *indices: int) -> dict[str, float]:
        """These concepts' adapters with their weights; all of them with none given.

        One adapter that serves two concepts acts with the sum of their weights.
        """
        return summed_weights(
            *(
                {self.concepts[index]: self.request.concepts[index].weight}
                for index in indices or range(len(self.concepts))
            )
        )

    def encode_one(
        self,
        prompt: str,
        negative: str,
        adapters: Mapping[str, float],
        pointer: str = "/prompt",
        negative_pointer: str = "/negative_prompt",
    ) -> Conditioning:
        """The words of one branch: see `encode`."""
        return self.encode([PromptPair(prompt, negative, pointer, negative_pointer)], adapters)[0]

    def encode_each(self, words: Sequence[PromptPair], adapters: Sequence[Mapping[str, float]]) -> list[Conditioning]:
        """The words of branches that have their own adapters in the text encoders; in few passes, as many of them have
        the same ones. Raises as `encode`."""
        alike: dict[Any, list[int]] = {}
        for index, (item, own) in enumerate(zip(words, adapters, strict=True)):
            # with and without a negative prompt are two: SDXL has zeros for none
            alike.setdefault((tuple(own.items()), bool(item.negative)), []).append(index)
        found: dict[int, Conditioning] = {}
        for indices in alike.values():
            encoded = self.encode([words[index] for index in indices], adapters[indices[0]])
            found |= zip(indices, encoded, strict=True)
        return [found[index] for index in range(len(words))]

    def encode(self, words: Sequence[PromptPair], adapters: Mapping[str, float]) -> list[Conditioning]:
        """The words of branches with these adapters in the text encoders, in one pass.

        Args:
            words: all with a negative prompt, or all without one.

        Raises:
            ComposeRefused: a prompt is too long.
        """
        pipe: Any = self.loaded.pipeline
        for text, where in dict.fromkeys(text for item in words for text in item.texts):
            for tokenizer in (pipe.tokenizer, getattr(pipe, "tokenizer_2", None)):
                if tokenizer is not None:
                    prompt_ids(tokenizer, text, where, self.token_limit)
        self.loaded.activate_text(adapters)
        found = pipe.encode_prompt(
            prompt=[item.prompt for item in words],
            negative_prompt=[item.negative for item in words] if words[0].negative else None,
            device=self.loaded.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            clip_skip=self.options.clip_skip,
        )
        dtype, rows = self.dtype, range(len(words))
        contexts = [torch.stack([found[1][row], found[0][row]]).to(dtype) for row in rows]
        if not self.loaded.is_xl:
            return [Conditioning(context) for context in contexts]
        size = (self.height, self.width)
        ids = pipe._get_add_time_ids(
            size, (0, 0), size, dtype=dtype, text_encoder_projection_dim=pipe.text_encoder_2.config.projection_dim
        )
        time_ids = ids.repeat(2, 1).to(self.loaded.device)
        pooled = [torch.stack([found[3][row], found[2][row]]).to(dtype) for row in rows]
        return [Conditioning(*item, time_ids) for item in zip(contexts, pooled, strict=True)]

    @property
    def token_limit(self) -> int | None:
        """The most tokens that every text encoder has a position for."""
        sizes = [getattr(item.config, "max_position_embeddings", None) for item in self.loaded.text_encoders]
        known = [int(size) for size in sizes if size]
        return min(known) if known else None

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditionings: Conditioning | list[Conditioning],
        *,
        conditional_only: bool = False,
    ) -> Tensor | None:
        """One pass of the UNet with the adapters that are active now.

        Args:
            latents: (1, c, h, w), float32, of the sampler.
            conditionings: of one branch, or of several that share the latent.
            conditional_only: leave the negative prompt out.

        Returns:
            (b, c, h, w) in float32: for each branch the unconditional and the conditional prediction, or only the
            latter. None where the pass was stopped after the last layer that it was for.
        """
        branches = conditionings if isinstance(conditionings, list) else [conditionings]
        rows = slice(1, 2) if conditional_only else slice(0, 2)
        context = torch.cat([item.context[rows] for item in branches])
        added = None
        if branches[0].pooled is not None:
            added = {
                "text_embeds": torch.cat([_given(item.pooled)[rows] for item in branches]),
                "time_ids": torch.cat([_given(item.time_ids)[rows] for item in branches]),
            }
        samples = len(context)
        sample = self.schedule.scaled(latents, timestep).to(self.dtype).expand(samples, -1, -1, -1)
        started = time.perf_counter()
        try:
            found: Tensor = self.loaded.unet(
                sample, timestep, encoder_hidden_states=context, added_cond_kwargs=added, return_dict=False
            )[0]
        except Stop:
            self.passes.truncated += samples
            return None
        finally:
            self.passes.seconds += time.perf_counter() - started
        self.passes.full += samples
        return found.float()

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Prediction:
        """Both halves of one branch, or the conditional one where guidance is off."""
        found = self.forward(latents, timestep, conditioning, conditional_only=not self.guided)
        if found is None:
            raise AssertionError("a prediction needs the whole UNet")
        return Prediction(found[:1], found[1:]) if self.guided else Prediction(None, found)

    def guide(self, prediction: Prediction) -> Tensor:
        """ε_u + g·(ε_c − ε_u), rescaled if that is asked for; (1, c, h, w)."""
        if prediction.uncond is None:
            return prediction.cond
        noise = prediction.uncond + self.options.guidance_scale * (prediction.cond - prediction.uncond)
        share = self.options.guidance_rescale
        if not share:
            return noise
        axes = list(range(1, noise.ndim))
        rescaled = noise * (prediction.cond.std(dim=axes, keepdim=True) / noise.std(dim=axes, keepdim=True))
        return share * rescaled + (1 - share) * noise

    def decode(self, latents: Tensor) -> Any:
        """The picture of a latent, a PIL image."""
        pipe: Any = self.loaded.pipeline
        vae = pipe.vae
        with torch.no_grad(), _precise(vae):
            config = vae.config
            z = latents.to(vae.dtype) / config.scaling_factor
            shift, mean, deviation = (
                getattr(config, key, None) for key in ("shift_factor", "latents_mean", "latents_std")
            )
            if mean is not None and deviation is not None:
                shape = (1, -1, 1, 1)
                z = z * torch.tensor(deviation).view(shape).to(z) + torch.tensor(mean).view(shape).to(z)
            elif shift:
                z = z + shift
            pixels = vae.decode(z, return_dict=False)[0].float()
        return pipe.image_processor.postprocess(pixels, output_type="pil")[0]


def check_finite(value: Tensor, what: str, step: int) -> None:
    """Raises CompositionDiverged, naming the 0-based step."""
    # a sum is finite only if all its terms are, and costs a third; where it is not, it may have overflowed by itself
    if not math.isfinite(float(value.sum())) and not bool(torch.isfinite(value).all()):
        raise CompositionDiverged(
            f"{what} became NaN or infinite in step {step}.",
            hint="Lower step_size, or compute in float32 or bfloat16.",
        )


def checked_size(loaded: LoadedPipeline, height: int | None, width: int | None, multiple: int) -> tuple[int, int]:
    """(height, width) in pixels, the model's own where they are not given.

    Raises:
        ComposeRefused: a side is no multiple of `multiple` pixels.
    """
    native = loaded.unet.config.sample_size
    sides = (native, native) if isinstance(native, int) else tuple(native)
    found = []
    for name, given, own in (("height", height, sides[0]), ("width", width, sides[1])):
        side = own * loaded.vae_factor if given is None else given
        found.append(check_side(name, side, multiple))
    return found[0], found[1]


def summed_weights(*parts: Mapping[str, float]) -> dict[str, float]:
    """An adapter that is named twice acts with both its weights."""
    found: dict[str, float] = {}
    for part in parts:
        for name, weight in part.items():
            found[name] = found.get(name, 0.0) + weight
    return found


def _given(value: Tensor | None) -> Tensor:
    if value is None:
        raise AssertionError("all branches have pooled embeddings, or none has")
    return value


@contextmanager
def _precise(vae: Any) -> Iterator[None]:
    """SDXL's VAE overflows in half precision; its halves become the same halves again afterwards."""
    if vae.dtype != torch.float16 or not getattr(vae.config, "force_upcast", False):
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(torch.float16)
