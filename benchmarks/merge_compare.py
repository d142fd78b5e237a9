"""What a comparison of six merges costs, against the slowest of them alone.

    python -m benchmarks.merge_compare [--adapters 8] [--rank 16] [--layers 2]

Synthetic adapters of the Llama-2-7B shape. Every merge alone and the comparison of all run in this process, one after
the other, files to files in new folders. The goal, of six cheap merges, of six methods at one rank, and of one method
of each of six families, single entries among them: the comparison takes at most twice the time of the slowest merge.
Times are the least of five runs; CPU seconds are those of all threads, which a busy machine disturbs less.

Prints three tables and writes benchmarks/results/merge_compare.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.merge_adapters import make_adapters, shapes

Candidates = tuple[tuple[str, dict[str, Any]], ...]
SETS: dict[str, Candidates] = {
    "cheap merges": (
        ("cat", {}),
        ("linear", {"rank": 32}),
        ("svd", {"rank": 16}),
        ("svd", {"rank": 32}),
        ("lego", {"rank": 16}),
        ("lego", {"rank": 32}),
    ),
    "methods": tuple((method, {"rank": 16}) for method in ("svd", "lego", "tsv_m", "iso_c", "knots", "core_space")),
    "families": (
        ("svd", {"rank": 16}),
        ("lego", {"rank": 16}),
        ("tsv_m", {"rank": 16}),
        ("knots", {"rank": 16}),
        ("ties", {}),
        ("ties_svd", {"rank": 16}),
    ),
}
RUNS = 5
GOAL = 2.0
RESULTS = Path(__file__).parent / "results" / "merge_compare.json"


def measure(folder: Path, count: int, rank: int, layers: int) -> dict[str, Any]:
    """By set of candidates: seconds of every merge alone, of the comparison, and their ratio."""
    from artifacts.adapter import Adapter
    from artifacts.base_model import BaseModelRef
    from merge.catalog import parse_parameters
    from merge.comparison import Candidate, compare_files
    from merge.compiling import compile_loops
    from merge.engine import merge_files
    from merge.plan import MergeInput

    compile_loops()
    base = BaseModelRef.named("llama-2-7b")
    inputs = [
        (
            MergeInput(
                path.name, path.name, path.name, tuple(Adapter.open(path).modules.values()), "lora", True, None, base
            ),
            path,
        )
        for path in make_adapters(folder, count, rank, list(shapes(layers)))
    ]
    found: dict[str, Any] = {}
    for name, chosen in SETS.items():
        candidates = [
            Candidate(f"{method} {parameters}", method, parse_parameters(method, parameters))
            for method, parameters in chosen
        ]
        for item in candidates:  # the files are in the cache and the kernels are warm
            merge_files(inputs[:2], item.method, item.options, folder / "warm")
        alone = {
            item.label: timed(partial(merge_files, inputs, item.method, item.options), folder / "alone")
            for item in candidates
        }
        comparison = timed(partial(compare_files, inputs, candidates), folder / "compared")
        found[name] = {"alone": alone, "comparison": comparison}
        for clock in ("seconds", "cpu_seconds"):
            slowest = max(times[clock] for times in alone.values())
            found[name][f"sum_{clock}"] = sum(times[clock] for times in alone.values())
            found[name][f"ratio_{clock}"] = comparison[clock] / slowest
    return found


def timed(work: Callable[[Path], object], out: Path) -> dict[str, float]:
    """The least wall clock and CPU seconds of some runs, each into a folder that was not there."""
    runs = []
    for _ in range(RUNS):
        started, cpu_started = time.perf_counter(), time.process_time()
        work(out)
        runs.append((time.perf_counter() - started, time.process_time() - cpu_started))
        shutil.rmtree(out)
    seconds, cpu_seconds = zip(*runs, strict=True)
    return {"seconds": min(seconds), "cpu_seconds": min(cpu_seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), arguments.adapters, arguments.rank, arguments.layers)
    for name, of in found.items():
        print(f"Six {name}:")
        for label, times in of["alone"].items():
            print(f"{label:28} {times['seconds']:7.2f} s {times['cpu_seconds']:7.2f} CPU s alone")
        print(f"{'all six, one by one':28} {of['sum_seconds']:7.2f} s {of['sum_cpu_seconds']:7.2f} CPU s")
        print(
            f"{'compared':28} {of['comparison']['seconds']:7.2f} s {of['comparison']['cpu_seconds']:7.2f} CPU s = "
            f"{of['ratio_seconds']:.2f} × the slowest, {of['ratio_cpu_seconds']:.2f} × in CPU seconds (goal {GOAL})"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**vars(arguments), "goal": GOAL, "sets": found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
