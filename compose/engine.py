"""Makes an image: checks, loads, samples, and leaves the pipeline as it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compose.catalog import find_method
from compose.composition import Composition, StepReport
from compose.pipelines import LoadedPipeline, PipelineCache
from compose.protocol import CompositionMethod
from compose.request import CompositionRequest
from compose.scene import Scene, check_finite, checked_size
from compose.schedulers import make_schedule
from compose.validation import Validated, validate

OnStep = Callable[[StepReport], None]


def compose(
    request: CompositionRequest,
    pipelines: PipelineCache,
    on_step: OnStep | None = None,
    *,
    latents: Tensor | None = None,
) -> Composition:
    """Make the image of a request.

    Args:
        on_step: called after every step; may raise to stop, after which the pipeline is as it was.
        latents: (1, c, h, w) standard normal noise to begin with, for comparisons; unset, it is drawn from the seed.

    Raises:
        ComposeRefused and its kin: the request does not fit itself, or the model. CompositionDiverged: NaN.
    """
    validated = validate(request)
    return compose_with(pipelines.get(request.base), request, validated, on_step, latents=latents)


def compose_with(
    loaded: LoadedPipeline,
    request: CompositionRequest,
    validated: Validated,
    on_step: OnStep | None = None,
    *,
    latents: Tensor | None = None,
) -> Composition:
    """As `compose`, with a pipeline that is at hand."""
    started = time.perf_counter()
    with loaded.lock, torch.no_grad(), loaded.restored(), ExitStack() as stack:
        scene = make_scene(loaded, request, validated)
        method: CompositionMethod = find_method(request.method).load()(scene, stack)
        method.prepare()
        noise = _noise(scene) if latents is None else latents
        begin = method.start(noise.to(loaded.device, torch.float32) * scene.schedule.initial_sigma)
        final = _sample(scene, method, begin, on_step)
        decoding = time.perf_counter()
        image = scene.decode(final)
        decoded = time.perf_counter() - decoding
        evidence = method.evidence(image)
        report = _report(scene, method, validated, time.perf_counter() - started, decoded)
    return Composition(image, report, evidence.masks, evidence.pictures)


def make_scene(loaded: LoadedPipeline, request: CompositionRequest, validated: Validated) -> Scene:
    """Everything that a method needs; adapters are loaded. Raises as `compose`."""
    options = validated.options
    kind = find_method(request.method).load()
    multiple = kind.size_multiple(options, loaded.unet) * loaded.vae_factor
    height, width = checked_size(loaded, request.height, request.width, multiple)
    generator = torch.Generator().manual_seed(request.seed)
    schedule = make_schedule(loaded.pipeline.scheduler, options.scheduler, request.steps, loaded.device, generator)
    concepts = tuple(
        loaded.adapter(item.adapter, item.name, f"/concepts/{index}/adapter")
        for index, item in enumerate(request.concepts)
    )
    styles = tuple(
        loaded.adapter(item.adapter, item.name, f"/styles/{index}/adapter") for index, item in enumerate(request.styles)
    )
    scene = Scene(loaded, request, options, validated.prompts, schedule, concepts, styles, height, width)
    scene.warnings += validated.warnings
    return scene


def _noise(scene: Scene) -> Tensor:
    """Drawn on the CPU in float32, so that a seed means the same image on every device."""
    channels = int(scene.loaded.unet.config.in_channels)
    return torch.randn(1, channels, *scene.latent_size, generator=scene.schedule.generator)


def _sample(scene: Scene, method: CompositionMethod, latents: Tensor, on_step: OnStep | None) -> Tensor:
    total = scene.steps
    for index, timestep in enumerate(scene.schedule.timesteps):
        done = method.step(index, timestep, latents)
        check_finite(done.noise, "The prediction", index)
        latents, foreseen = scene.schedule.step(done.noise, timestep, done.latents)
        if on_step is not None:
            shown = latents if foreseen is None else foreseen
            on_step(StepReport(index + 1, total, partial(scene.decode, shown)))
    return latents


def _report(
    scene: Scene, method: CompositionMethod, validated: Validated, seconds: float, decoding: float
) -> dict[str, Any]:
    request, passes = scene.request, scene.passes
    return {
        "method": request.method,
        "parameters": validated.options.model_dump(mode="json"),
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "concepts": [
            {"adapter": item.name, "trigger": item.trigger, "noun": item.noun, "weight": item.weight}
            for item in request.concepts
        ],
        "styles": [{"adapter": item.name, "weight": item.weight} for item in request.styles],
        "seed": request.seed,
        "width": scene.width,
        "height": scene.height,
        "steps": scene.steps,
        "scheduler": scene.schedule.name,
        "passes": {
            "unet_samples": passes.full + passes.truncated,
            "full": passes.full,
            "truncated": passes.truncated,
            "backward": passes.backward,
        },
        "seconds": {"total": seconds, "unet": passes.seconds, "decode": decoding},
        **method.report(),
        "warnings": list(dict.fromkeys(scene.warnings)),
    }
