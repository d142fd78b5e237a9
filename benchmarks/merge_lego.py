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
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METHODS = ("lego", "cat", "svd")
GOALS = {"lego": 6.0, "cat": 2.5, "svd": 5.0}
RESULTS = Path(__file__).parent / "results" / "merge_lego.json"


def shapes(layers: int) -> Iterator[tuple[str, int, int]]:
    """(path, d_out, d_in) of the linear modules of Llama-2-7B."""
    for layer in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"model.layers.{layer}.self_attn.{name}", 4096, 4096
        for name in ("gate_proj", "up_proj"):
            yield f"model.layers.{layer}.mlp.{name}", 11008, 4096
        yield f"model.layers.{layer}.mlp.down_proj", 4096, 11008


def make_adapters(directory: Path, count: int, rank: int, layers: int) -> list[Path]:
    import torch
    from safetensors.torch import save_file

    paths = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for path, d_out, d_in in shapes(layers):
            A = torch.randn(rank, d_in, generator=generator) / d_in**0.5
            B = torch.randn(d_out, rank, generator=generator) * 0.01
            tensors[f"base_model.model.{path}.lora_A.weight"] = A.bfloat16()
            tensors[f"base_model.model.{path}.lora_B.weight"] = B.bfloat16()
        target = directory / f"adapter-{seed}"
        target.mkdir()
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 2 * rank,
            "base_model_name_or_path": "llama-2-7b",
            "target_modules": sorted({path.rsplit(".", 1)[-1] for path, _, _ in shapes(1)}),
        }
        (target / "adapter_config.json").write_text(json.dumps(config))
        paths.append(target)
    return paths


def floor(inputs: list[Path], output_bytes: int, scratch: Path) -> float:
    """Seconds to read all inputs and write the output, plainly."""
    content = os.urandom(1 << 20) * (output_bytes // (1 << 20) + 1)
    started = time.perf_counter()
    for path in inputs:
        (path / "adapter_model.safetensors").read_bytes()
    (scratch / "floor.bin").write_bytes(memoryview(content)[:output_bytes])
    return time.perf_counter() - started


def merge_once(inputs: list[Path], method: str, rank: int, out: Path) -> dict[str, float]:
    """One merge in a new process: seconds from files to file, peak memory, and that of the idle worker before it."""
    command = [sys.executable, "-m", "benchmarks.merge_lego", "--child", method, "--rank", str(rank), "--out", str(out)]
    run = subprocess.run([*command, *map(str, inputs)], check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(run.stdout)
    return result


def peak_memory_kb() -> int:
    """High-water mark of this process's memory. (getrusage would carry over that of the process that started it.)"""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])


def child(inputs: list[Path], method: str, rank: int, out: Path) -> None:
    from artifacts.adapter import Adapter
    from artifacts.base_model import BaseModelRef
    from merge.catalog import METHODS as MENU
    from merge.catalog import parse_parameters
    from merge.engine import merge_files
    from merge.kmeans import compile_loops
    from merge.plan import MergeInput

    # A worker serves many merges: its compiled loops and kernels are there already.
    MENU[method].load()
    compile_loops()
    idle = peak_memory_kb()
    started = time.perf_counter()
    described = [
        (
            MergeInput(
                id=path.name,
                name=path.name,
                digest=path.name,
                modules=tuple(Adapter.open(path).modules.values()),
                method="lora",
                mergeable=True,
                refusal=None,
                base=BaseModelRef.named("llama-2-7b"),
            ),
            path,
        )
        for path in inputs
    ]
    options = parse_parameters(method, {} if method == "cat" else {"rank": rank})
    merge_files(described, method, options, out)
    seconds = time.perf_counter() - started
    peak = peak_memory_kb()
    print(json.dumps({"seconds": seconds, "idle_kb": idle, "peak_kb": peak}))


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
    inputs = make_adapters(scratch, arguments.adapters, arguments.rank, arguments.layers)
    size = sum((path / "adapter_model.safetensors").stat().st_size for path in inputs)
    output = {"lego": size // arguments.adapters, "svd": size // arguments.adapters, "cat": size}
    table: dict[str, Any] = {"input_bytes": size, "cores": os.cpu_count(), "methods": {}}
    for method in METHODS:
        out = scratch / f"out-{method}"
        merge_once(inputs, method, arguments.rank, out)  # page cache and compiled loops
        pairs = []
        for _ in range(arguments.runs):
            base = floor(inputs, output[method], scratch)
            pairs.append((merge_once(inputs, method, arguments.rank, out), base))
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
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("inputs", nargs="*", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.inputs, arguments.child, arguments.rank, arguments.out)
        return
    with tempfile.TemporaryDirectory(prefix="rankwise-bench-") as scratch:
        table = measure(arguments, Path(scratch))
    show(table)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
