"""Composition beside diffusers' own pipeline on the same model: passes of the UNet, time, memory.

    python -m benchmarks.compose                                   ShapesSD with two of its adapters
    python -m benchmarks.compose --base SD15 --adapters A B --triggers sks zwx --nouns dog cat \
        --prompt "a dog and a cat" --steps 50

Passes are counted in samples (guidance makes two of one) and set against what the authors' code does at the same
settings: all branches with both halves in every pass, and a gradient through all of that. A pass of ours that stops
after the last map counts by its share of the UNet's multiplications, which is also told for the UNet of Stable
Diffusion 1.5 at 512 pixels. Both ways to hold graphs are counted: all at once, which auto takes where they fit, and one
at a time. Times are medians of rounds in turns, and the least of them for what is outside of UNet and decoder; memory
is that of tensors made in one update.

Prints the table with its goals and writes benchmarks/results/compose.json. Other work on the machine makes every
figure of time worthless.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.compose_counts import Counted, peak_bytes, sd15_truncated_share, truncated_share
from benchmarks.pool_figures import RESULTS, Figure, show, write
from compose.engine import compose
from compose.latent_update import cached_gradient, joint_gradient
from compose.pipelines import PipelineCache
from compose.request import CompositionRequest, Concept
from examples.shapes_sd.concepts import ADAPTERS, BASE

PASS_GOAL, WALL_GOAL, MEMORY_GOAL, MASK_ONLY_GOAL, OVERHEAD_GOAL_MS = 0.6, 1.15, 1.3, 3.2, 50.0
SECTION = "compose"
WAYS = (("all graphs at once", "auto"), ("one graph at a time", "always"))
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def request_of(arguments: argparse.Namespace) -> CompositionRequest:
    """CLoRA as in the paper: updates in the first half, repeated in the steps 0, 10 and 20."""
    concepts = tuple(
        Concept(path, path.name, trigger, noun)
        for path, trigger, noun in zip(arguments.adapters, arguments.triggers, arguments.nouns, strict=True)
    )
    parameters = {
        "guidance_scale": arguments.guidance,
        "step_size": arguments.step_size,
        "iterative_repeats": arguments.repeats,
    }
    return CompositionRequest(arguments.base, concepts, arguments.prompt, parameters=parameters, steps=arguments.steps)


def pass_figures(
    way: str, counted: Counted, official: Counted, share: float, sd15: float, detail: Mapping[str, Any]
) -> list[Figure]:
    """The counts, with the passes that stop early as whole ones, as their share here, as their share in SD 1.5."""
    whole = official.full
    both = official.full + official.backward
    forward = counted.full + counted.truncated
    values = (
        ("forward samples × the authors'", forward / whole, None),
        ("forward and backward samples × the authors'", (forward + counted.backward) / both, None),
        ("the same by multiplications, this UNet", counted.weighed(share) / both, None),
        ("the same by multiplications, SD 1.5", counted.weighed(sd15) / both, PASS_GOAL),
    )
    return [Figure(f"{way}: {name}", value, "×", goal, detail=dict(detail)) for name, value, goal in values]


def official_count(branches: int, steps: int, updates: int, repeats: int) -> Counted:
    """Of the authors' code: both halves of every branch in every pass, a gradient through all of them.

    Args:
        updates: steps with an update. repeats: further updates, over all steps.
    """
    return Counted(2 * branches * (steps + repeats), 0, 2 * branches * (updates + repeats))


def _with(request: CompositionRequest, **parameters: Any) -> CompositionRequest:
    return replace(request, parameters={**request.parameters, **parameters})


def measure(arguments: argparse.Namespace) -> list[Figure]:
    pipelines = PipelineCache()
    request = request_of(arguments)
    plain_request = replace(
        request, method="clora_mask_only", parameters={"guidance_scale": arguments.guidance, "map_grid": None}
    )
    loaded = pipelines.get(request.base)
    share, sd15 = truncated_share(loaded.unet), sd15_truncated_share()
    branches, found = len(request.concepts) + 1, []
    for way, choice in WAYS:
        report = compose(_with(request, gradient_caching=choice), pipelines).report
        passes, updates = report["passes"], report["updates"]
        updated = len({item["step"] for item in updates})
        counted = Counted(passes["full"], passes["truncated"], passes["backward"])
        official = official_count(branches, arguments.steps, updated, len(updates) - updated)
        detail = {"ours": counted, "official": official, "truncated": share, "branches": branches, "caching": choice}
        found += pass_figures(way, counted, official, share, sd15, detail)
    compose(plain_request, pipelines)
    found.append(_wall(arguments, request, pipelines))
    found += _memory(_with(request, gradient_caching="always"), pipelines)
    found += _mask_only(arguments, plain_request, pipelines)
    return found


def _wall(arguments: argparse.Namespace, request: CompositionRequest, pipelines: PipelineCache) -> Figure:
    """An image's time against that of its passes alone, each timed inside the run, and the decoder."""
    ratios = []
    for _ in range(arguments.rounds):
        timed = _Timed()
        with (
            mock.patch("compose.methods.clora.cached_gradient", timed.of(cached_gradient)),
            mock.patch("compose.methods.clora.joint_gradient", timed.of(joint_gradient)),
        ):
            report = compose(request, pipelines).report
        seconds = report["seconds"]
        # forward passes outside of updates: what was timed in all, less what was timed in updates
        alone = seconds["unet"] - timed.forward + timed.whole
        ratios.append((seconds["total"] - seconds["decode"]) / alone)
    return Figure("time of an image × its passes", statistics.median(ratios), "×", WALL_GOAL, detail={"ratios": ratios})


class _Timed:
    """Seconds of updates: of everything from the latent to its gradient, and of the forward passes in it."""

    def __init__(self) -> None:
        self.whole = self.forward = 0.0

    def of(self, gradient: Callable[..., Any]) -> Callable[..., Any]:
        """A way to the gradient, timed."""

        def timed_gradient(latents: Any, branches: int, maps_of: Any, loss_of: Any) -> Any:
            began = time.perf_counter()

            def timed(indices: Sequence[int], z: Any) -> Any:
                start = time.perf_counter()
                found = maps_of(indices, z)
                self.forward += time.perf_counter() - start
                return found

            found = gradient(latents, branches, timed, loss_of)
            self.whole += time.perf_counter() - began
            return found

        return timed_gradient


def _memory(request: CompositionRequest, pipelines: PipelineCache) -> list[Figure]:
    """The first update with all branches, one graph at a time and all at once, and with one branch."""
    peaks: dict[str, int] = {}

    def measured(latents: Any, branches: int, maps_of: Any, loss_of: Any) -> Any:
        if not peaks:
            peaks["one at a time"] = peak_bytes(lambda: cached_gradient(latents, branches, maps_of, loss_of))
            peaks["all at once"] = peak_bytes(lambda: joint_gradient(latents, branches, maps_of, loss_of))
            peaks["one"] = peak_bytes(lambda: cached_gradient(latents, 1, maps_of, lambda maps: maps[0].square().sum()))
        return cached_gradient(latents, branches, maps_of, loss_of)

    with mock.patch("compose.methods.clora.cached_gradient", measured):
        compose(request, pipelines)
    one = peaks["one"]
    name = "peak memory of an update, all branches × one"
    return [
        Figure(f"one graph at a time: {name}", peaks["one at a time"] / one, "×", MEMORY_GOAL, detail=dict(peaks)),
        Figure(f"all graphs at once: {name}", peaks["all at once"] / one, "×", detail=dict(peaks)),
    ]


def _mask_only(arguments: argparse.Namespace, request: CompositionRequest, pipelines: PipelineCache) -> list[Figure]:
    """Against diffusers' own call with as many steps, and what is not the UNet's."""
    loaded = pipelines.get(request.base)
    plain, own, overheads = [], [], []
    for index in range(arguments.rounds + 1):
        began = time.perf_counter()
        loaded.pipeline(
            request.prompt,
            num_inference_steps=request.steps,
            guidance_scale=arguments.guidance,
            generator=torch.Generator().manual_seed(index),
        )
        between = time.perf_counter()
        seconds = compose(replace(request, seed=index), pipelines).report["seconds"]
        taken = time.perf_counter() - between
        if index:  # the first round warms up
            plain.append(between - began)
            own.append(taken)
            overheads.append(1000 * (taken - seconds["unet"] - seconds["decode"]))
    detail = {"plain_seconds": plain, "seconds": own}
    return [
        Figure("a plain generation by diffusers", statistics.median(plain), "s", detail=detail),
        Figure(
            f"mask-only, {len(request.concepts) + 1} branches × plain",
            statistics.median(own) / statistics.median(plain),
            "×",
            MASK_ONLY_GOAL,
            detail=detail,
        ),
        Figure(
            "mask-only outside of UNet and decoder",
            min(overheads),
            "ms",
            OVERHEAD_GOAL_MS,
            detail={"milliseconds": overheads, "steps": request.steps},
        ),
    ]


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=BASE)
    both = [ADAPTERS / name for name in ("magenta_circle", "green_square")]
    parser.add_argument("--adapters", type=Path, nargs="+", default=both)
    parser.add_argument("--triggers", nargs="+", default=["sks", "zwx"])
    parser.add_argument("--nouns", nargs="+", default=["circle", "square"])
    parser.add_argument("--prompt", default="a circle and a square")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=20, help="further updates in the steps 0, 10 and 20")
    parser.add_argument("--step-size", type=float, default=5.0)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="cpu: of this process, for one thread on a busy machine"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse(words)
    torch.set_num_threads(arguments.threads)
    with mock.patch("time.perf_counter", CLOCKS[arguments.clock]):
        figures = measure(arguments)
    show(SECTION, figures)
    print(f"\n→ {write(SECTION, figures, vars(arguments), arguments.results, prefix='')}")


if __name__ == "__main__":
    main()
