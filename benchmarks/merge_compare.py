"""What a comparison of six merges costs, against the slowest of them alone.

    python -m benchmarks.merge_compare [--adapters 8] [--rank 16] [--layers 2]

Synthetic adapters of the Llama-2-7B shape. Every merge alone and the comparison of all run in this process, one after
the other, files to files. The goal: the comparison takes at most twice the time of the slowest merge. Times are the
least of three runs; CPU seconds are those of all threads, which a busy machine disturbs less.

Prints a table and writes benchmarks/results/merge_compare.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.merge_adapters import make_adapters, shapes

CANDIDATES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("cat", {}),
    ("linear", {"rank": 32}),
    ("svd", {"rank": 16}),
    ("svd", {"rank": 32}),
    ("lego", {"rank": 16}),
    ("lego", {"rank": 32}),
)
GOAL = 2.0
RESULTS = Path(__file__).parent / "results" / "merge_compare.json"


def measure(folder: Path, count: int, rank: int, layers: int) -> dict[str, Any]:
    """Seconds of every merge alone, of the comparison, and their ratio."""
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
    candidates = [
        Candidate(f"{method} {parameters}", method, parse_parameters(method, parameters))
        for method, parameters in CANDIDATES
    ]
    for item in candidates:  # the files are in the cache and the kernels are warm
        merge_files(inputs[:2], item.method, item.options, folder / "warm")
    alone = {
        item.label: timed(partial(merge_files, inputs, item.method, item.options, folder / f"alone-{number}"))
        for number, item in enumerate(candidates)
    }
    comparison = timed(partial(compare_files, inputs, candidates, folder / "compared"))
    found: dict[str, Any] = {"alone": alone, "comparison": comparison, "goal": GOAL}
    for clock in ("seconds", "cpu_seconds"):
        slowest = max(times[clock] for times in alone.values())
        found[f"sum_{clock}"] = sum(times[clock] for times in alone.values())
        found[f"ratio_{clock}"] = comparison[clock] / slowest
    return found


def timed(work: Callable[[], object]) -> dict[str, float]:
    """The least wall clock and CPU seconds of three runs."""
    runs = []
    for _ in range(3):
        started, cpu_started = time.perf_counter(), time.process_time()
        work()
        runs.append((time.perf_counter() - started, time.process_time() - cpu_started))
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
    for label, times in found["alone"].items():
        print(f"{label:28} {times['seconds']:7.2f} s {times['cpu_seconds']:7.2f} CPU s alone")
    print(f"{'all six, one by one':28} {found['sum_seconds']:7.2f} s {found['sum_cpu_seconds']:7.2f} CPU s")
    print(
        f"{'compared':28} {found['comparison']['seconds']:7.2f} s {found['comparison']['cpu_seconds']:7.2f} CPU s = "
        f"{found['ratio_seconds']:.2f} × the slowest, {found['ratio_cpu_seconds']:.2f} × in CPU seconds (goal {GOAL})"
    )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**vars(arguments), **found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
