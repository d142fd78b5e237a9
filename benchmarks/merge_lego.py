"""How fast a merge is, against reading its input and writing its output, and against scikit-learn's k-means.

    python -m benchmarks.merge_lego [--adapters 8] [--rank 16] [--layers 32] [--runs 3]

Synthetic adapters of the Llama-2-7B shape (224 linear modules, bfloat16). Everything is measured in one run:

* floor: read every input file into memory and write as many bytes as the merged file has;
* the whole merge, files to file, in a process of its own that an idle worker's memory is compared with;
* scikit-learn's KMeans (n_init=10) in the full space on one module of each shape, extrapolated to all modules;
* for svd, the difference from a dense SVD of one module.

Prints a table and writes benchmarks/results/merge_lego.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.merge_adapters import WEIGHTS, floor, make_adapters, merge_once, shapes

METHODS = ("lego", "cat", "svd")
GOALS = {"lego": 6.0, "cat": 2.5, "svd": 5.0}
RESULTS = Path(__file__).parent / "results" / "merge_lego.json"


def sklearn_seconds(inputs: list[Path], clusters: int, layers: int) -> float:
    """KMeans (n_init=10) on the raw components of one module of each shape, extrapolated to all modules."""
    import torch
    from sklearn.cluster import KMeans

    from artifacts.adapter import Adapter

    adapters = [Adapter.open(path) for path in inputs]
    total = 0.0
    for name, count in (("self_attn.q_proj", 4), ("mlp.gate_proj", 2), ("mlp.down_proj", 1)):
        factors = [adapter[f"model.layers.0.{name}"] for adapter in adapters]
        points = torch.cat([torch.cat([f.A, f.B.T], dim=1).float() * f.scaling**0.5 for f in factors]).numpy()
        started = time.perf_counter()
        KMeans(clusters, n_init=10, random_state=0).fit(points)
        total += count * layers * (time.perf_counter() - started)
    return total


def dense_difference(inputs: list[Path], rank: int) -> float:
    """‖ΔW_svd − dense‖/‖dense‖ on one module, the dense one by a full SVD of the 4096×4096 sum."""
    import torch

    from artifacts.adapter import Adapter
    from merge.catalog import parse_parameters
    from merge.methods import svd
    from merge.options import SvdOptions
    from merge.plan import PlannedModule
    from merge.stack import Stack

    path = "model.layers.0.self_attn.q_proj"
    adapters = {i: Adapter.open(directory) for i, directory in enumerate(inputs)}
    module = PlannedModule(path, tuple((i, adapter.modules[path]) for i, adapter in adapters.items()))
    stack = Stack.load(module, adapters, [1.0] * len(inputs), torch.float32, torch.device("cpu"))
    options = parse_parameters("svd", {"rank": rank})
    assert isinstance(options, SvdOptions)
    merged = svd.merge(stack, options, rank)
    exact = sum((a[path].scaling * a[path].B.double() @ a[path].A.double() for a in adapters.values()), torch.zeros(()))
    U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return float((merged.B.double() @ merged.A.double() - best).norm() / best.norm())


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    inputs = make_adapters(scratch, arguments.adapters, arguments.rank, list(shapes(arguments.layers)))
    size = sum((path / WEIGHTS).stat().st_size for path in inputs)
    output = {"lego": size // arguments.adapters, "svd": size // arguments.adapters, "cat": size}
    table: dict[str, Any] = {"input_bytes": size, "cores": os.cpu_count(), "methods": {}}
    for method in METHODS:
        out = scratch / f"out-{method}"
        parameters = {} if method == "cat" else {"rank": arguments.rank}
        merge_once(inputs, method, parameters, out)  # page cache and compiled loops
        pairs = []
        for _ in range(arguments.runs):
            base = floor(inputs, output[method], scratch)
            pairs.append((merge_once(inputs, method, parameters, out), base))
        seconds = statistics.median(run["seconds"] for run, _ in pairs)
        table["methods"][method] = {
            "seconds": seconds,
            "floor_seconds": statistics.median(base for _, base in pairs),
            "ratio": statistics.median(run["seconds"] / base for run, base in pairs),
            "goal": GOALS[method],
            "memory_above_idle_mb": max((run["peak_kb"] - run["idle_kb"]) / 1024 for run, _ in pairs),
        }
    if not arguments.quick:
        reference = sklearn_seconds(inputs, arguments.rank, arguments.layers)
        table["sklearn_seconds"] = reference
        table["speedup_over_sklearn"] = reference / table["methods"]["lego"]["seconds"]
        table["svd_difference_from_dense"] = dense_difference(inputs, arguments.rank)
    return table


def show(table: dict[str, Any]) -> None:
    print(f"input {table['input_bytes'] / 1e6:.0f} MB, {table['cores']} cores; medians of whole merges, files to file")
    print(f"{'method':8} {'seconds':>8} {'floor':>7} {'ratio':>6} {'goal':>6} {'memory above idle':>18}")
    for method, row in table["methods"].items():
        print(
            f"{method:8} {row['seconds']:8.2f} {row['floor_seconds']:7.2f} {row['ratio']:6.2f} "
            f"{row['goal']:6.1f} {row['memory_above_idle_mb']:15.0f} MB"
        )
    if "sklearn_seconds" in table:
        print(
            f"scikit-learn KMeans(n_init=10) in the full space, extrapolated: {table['sklearn_seconds']:.0f} s = "
            f"{table['speedup_over_sklearn']:.0f} × the whole lego merge (goal 30)"
        )
        print(f"svd against a dense SVD of one module: {table['svd_difference_from_dense']:.1e} (goal 1e-5)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="leave out scikit-learn and the dense SVD")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rankwise-bench-") as scratch:
        table = measure(arguments, Path(scratch))
    show(table)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
