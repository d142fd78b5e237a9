"""Measures every method of composition on ShapesSD, and prints the tables of docs/explanation/composition.md.

    python -m examples.shapes_sd.measure --work WORK                          everything: most of an hour on one core
    python -m examples.shapes_sd.measure --work WORK --pairs green --seeds 8 --parts methods

Every image's score is kept in WORK, so that a run goes on where the last one ended. All methods start from the same
noise for a seed; differences are paired over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from compose.engine import compose
from compose.pipelines import PipelineCache
from compose.request import CompositionRequest, Concept
from examples.shapes_sd.behaviour import locality, watch
from examples.shapes_sd.concepts import ADAPTERS, BASE
from examples.shapes_sd.runs import (
    CLORA_ROW,
    COMMON,
    CONTROLS,
    FLIPPED,
    GREEN,
    HEAVY,
    MASK_ONLY,
    MERGES,
    METHODS,
    PROMPT,
    STEPS,
    TOLD,
    YELLOW,
    Pair,
    Row,
    make,
    request_of,
)
from examples.shapes_sd.scorer import GREEN_SQUARE, MAGENTA_CIRCLE, YELLOW_SQUARE, background, components, to_array

FIRST_SEED = 2000
PAIRS = {"green": GREEN, "yellow": YELLOW}
FIGURES = ("first", "second", "both", "clean", "leak", "count_error")
WATCHED_STEPS = (2, 4, 8)
PARTS = ("alone", "methods", "style", "locality")
STYLE_WEIGHTS = (1.0, 0.6)
DARK_BELOW = 0.45
"""The style's ground is 0.3, the base model's 0.85."""
ALONE = (
    ("magenta_circle", "sks", "circle", MAGENTA_CIRCLE),
    ("green_square", "zwx", "square", GREEN_SQUARE),
    ("yellow_square", "zwx", "square", YELLOW_SQUARE),
)
Records = list[dict[str, Any]]


@cache
def pipelines() -> PipelineCache:
    """Of this process."""
    torch.set_num_threads(1)
    return PipelineCache()


def one(pair: Pair, row: Row, seed: int, base: Path, adapters: Path) -> dict[str, Any]:
    """An image's record."""
    request = request_of(pair, row, seed, base, adapters)
    if row.method.startswith("clora") and "apply_mask_after" not in row.parameters:
        made, steps = watch(request, pair.wanted, pipelines(), flipped=row.flipped)
        extra: dict[str, Any] = {"steps": {index: asdict(steps[index]) for index in WATCHED_STEPS}}
    else:
        made, extra = make(request, pair.wanted, pipelines(), flipped=row.flipped), {}
    extra["updates"] = [
        (item["step"], item["before"], item["after"]) for item in made.composition.report.get("updates", ())
    ]
    return {"row": row.name, "seed": seed, "seconds": made.seconds, **asdict(made.score), **extra}


def records(arguments: argparse.Namespace, name: str, row: Row, count: int) -> Records:
    """Of the first `count` seeds, from the file or made now."""
    path = arguments.work / f"{name}.jsonl"
    known = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    found = {item["seed"]: item for item in known if item["row"] == row.name}
    wanted = range(FIRST_SEED, FIRST_SEED + count)
    missing = [seed for seed in wanted if seed not in found]
    with path.open("a", encoding="utf-8") as file:
        for item in _made(arguments, PAIRS[name], row, missing):
            file.write(json.dumps(item) + "\n")
            file.flush()
            found[item["seed"]] = json.loads(json.dumps(item))
    return [found[seed] for seed in wanted]


def _made(arguments: argparse.Namespace, pair: Pair, row: Row, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    given = [(pair, row, seed, arguments.base, arguments.adapters) for seed in seeds]
    if arguments.processes == 1 or not given:
        yield from (one(*item) for item in given)
        return
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(one, *zip(*given, strict=True))


def line(row: Row, found: Records) -> str:
    """Of the Markdown table."""
    shares = [f"{_mean(item[figure] for item in found):.2f}" for figure in FIGURES]
    seconds = sorted(item["seconds"] for item in found)[len(found) // 2]
    return f"| {row.name} | {len(found)} | {' | '.join(shares)} | {seconds:.1f} |"


def paired(first: Records, second: Records, figure: str) -> str:
    """Mean difference over the seeds that both have, its standard error, seeds won and lost."""
    others = {item["seed"]: item[figure] for item in second}
    deltas = [int(item[figure]) - int(others[item["seed"]]) for item in first if item["seed"] in others]
    mean = sum(deltas) / len(deltas)
    error = math.sqrt(sum((delta - mean) ** 2 for delta in deltas) / max(len(deltas) - 1, 1) / len(deltas))
    return f"{mean:+.2f} (±{error:.2f}; {deltas.count(1)} won, {deltas.count(-1)} lost)"


def methods_part(arguments: argparse.Namespace, name: str) -> dict[str, Records]:
    """Score table of the methods and the controls, and paired differences to CLoRA."""
    print(f"\n### {PAIRS[name].name}\n")
    print("| method | seeds | circle | square | both | clean | leak | count error | CPU s |")
    print("|---|---|---|---|---|---|---|---|---|")
    found = {}
    half = max(arguments.seeds // 2, 1)
    rows = [(row, arguments.seeds if name == "green" else half) for row in METHODS]
    rows += [(row, half) for row in (*CONTROLS, *HEAVY, *TOLD)] if name == "green" else []
    for row, count in rows:
        found[row.name] = records(arguments, name, row, count)
        print(line(row, found[row.name]), flush=True)
    print("\n| CLoRA less | both | clean |\n|---|---|---|")
    for other in (*MERGES, MASK_ONLY):
        differences = [paired(found[CLORA_ROW.name], found[other.name], figure) for figure in ("both", "clean")]
        print(f"| {other.name} | {' | '.join(differences)} |")
    return found


def alone_part(arguments: argparse.Namespace) -> None:
    """Each concept's adapter by itself, in its branch's prompt and in one with its own shape only."""
    print("\n| adapter | prompt | its shape in its hue | the other shape in its hue too |\n|---|---|---|---|")
    for name, trigger, noun, wanted in ALONE:
        concept = (Concept(arguments.adapters / name, name, trigger, noun),)
        for prompt in (PROMPT, f"a {noun}"):
            hits, leaks = [], []
            for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds // 2):
                request = CompositionRequest(
                    arguments.base, concept, prompt, method="merge", parameters=COMMON, seed=seed, steps=STEPS
                )
                found = components(to_array(compose(request, pipelines()).image))
                coloured = {item.kind for item in found if item.has_hue(wanted.hue)}
                hits.append(wanted.kind in coloured)
                leaks.append(bool(coloured - {wanted.kind}))
            shown = prompt.replace(noun, f"{trigger} {noun}")
            print(f"| {name} | {shown} | {_mean(hits):.2f} | {_mean(leaks):.2f} |", flush=True)


def style_part(arguments: argparse.Namespace) -> None:
    """The style together with both concepts."""
    print(
        "\n| method | weight of the style | seeds | dark ground | both | clean | leak |\n|---|---|---|---|---|---|---|"
    )
    seeds = range(FIRST_SEED, FIRST_SEED + arguments.seeds // 2)
    for weight in STYLE_WEIGHTS:
        for row in (MERGES[0], CLORA_ROW):
            made = []
            for seed in seeds:
                request = request_of(GREEN, row, seed, arguments.base, arguments.adapters, style=weight)
                made.append(make(request, GREEN.wanted, pipelines()))
            dark = _mean(background(to_array(item.composition.image)).max() < DARK_BELOW for item in made)
            scores = [_mean(getattr(item.score, figure) for item in made) for figure in ("both", "clean", "leak")]
            shown = " | ".join(f"{value:.2f}" for value in (dark, *scores))
            print(f"| {row.name} | {weight} | {len(made)} | {shown} |", flush=True)


def separation_part(found: dict[str, Records]) -> None:
    """How far the update has drawn the maps apart, and whether the loss falls."""
    print("\n| step | gap without update | with | larger on | uphill, larger on | overlap of masks without | with |")
    print("|---|---|---|---|---|---|---|")
    plain, moved, flipped = (found[row.name] for row in (MASK_ONLY, CLORA_ROW, FLIPPED))
    for step in map(str, WATCHED_STEPS):
        gaps = [[item["steps"][step]["gap"] for item in rows] for rows in (plain, moved, flipped)]
        larger = [_mean(a > b for a, b in zip(rows, gaps[0], strict=False)) for rows in gaps[1:]]
        overlaps = [_mean(item["steps"][step]["overlap"] for item in rows) for rows in (plain, moved)]
        print(
            f"| {step} | {_mean(gaps[0]):.2f} | {_mean(gaps[1]):.2f} | {larger[0]:.0%} | {larger[1]:.0%} "
            f"| {overlaps[0]:.3f} | {overlaps[1]:.3f} |"
        )
    for row in (CLORA_ROW, FLIPPED):
        falls = [(item["updates"][0][1], item["updates"][5][2]) for item in found[row.name]]
        share = _mean(after < before for before, after in falls)
        means = [_mean(values) for values in zip(*falls, strict=True)]
        print(f"\n{row.name}: in step 0 the loss goes from {means[0]:.3f} to {means[1]:.3f}; it falls on {share:.0%}")
    for step in map(str, WATCHED_STEPS):
        covered = [item["steps"][step]["coverage"] for item in found[CLORA_ROW.name]]
        inside = _mean(all(0.05 <= share <= 0.4 for share in shares) for shares in covered)
        print(
            f"coverage in step {step}: {[round(_mean(c), 3) for c in zip(*covered, strict=True)]}, 5–40 % {inside:.0%}"
        )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps the records")
    parser.add_argument("--pairs", nargs="+", choices=tuple(PAIRS), default=tuple(PAIRS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, default=64, help="half as many for the controls and the second pair")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--adapters", type=Path, default=ADAPTERS)
    arguments = parser.parse_args(words)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if "alone" in arguments.parts:
        alone_part(arguments)
    if "style" in arguments.parts:
        style_part(arguments)
    for name in arguments.pairs:
        if "methods" in arguments.parts:
            found = methods_part(arguments, name)
            if name == "green":
                separation_part(found)
        if "locality" in arguments.parts:
            seeds = range(FIRST_SEED, FIRST_SEED + arguments.seeds // 2)
            print(f"\n{locality(PAIRS[name], seeds, pipelines(), arguments.base, arguments.adapters)}")


def _mean(values: Any) -> float:
    listed = [float(value) for value in values]
    return sum(listed) / len(listed)


if __name__ == "__main__":
    main()
