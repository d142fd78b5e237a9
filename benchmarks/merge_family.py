"""How fast every merge method is, against reading its input and writing its output, and against stock PEFT.

    python -m benchmarks.merge_family [--adapters 8] [--rank 16] [--layers 2] [--methods tsv_m,knots] [--peft]

Synthetic adapters of the Llama-2-7B shape (7 linear modules a layer, bfloat16); --layers 32 is the whole model. Each
method is one merge from files to a file in a process of its own; its ratio is to a plain read and write in the same
run. CPU seconds are those of all threads, which a busy machine disturbs less: their ratio is to those of the read and
write, which takes one thread, times the cores. A method on the entries of the deltas is measured against a second floor
too, in CPU seconds: forming every entry of every ΔWᵢ once, in tiles of a core's cache, and touching it once; `knots`
against forming its parts once and selecting the border of each. A third floor, the cold one, is the same read and write
when nothing of the inputs is in the page cache and the output is written through to the disk: what a user of new files
waits for.

--peft: two adapters of two layers, by `add_weighted_adapter` of stock PEFT and by the method of the same meaning here,
each in a process of its own: CPU seconds, and memory above the idle process. A combination that takes dense SVDs, one
for each module, would take PEFT hours: there it merges one module of 4096×4096, the smallest of all, and its figures
times the number of modules are the least that it can take.

Prints tables and writes benchmarks/results/merge_family.json.
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
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.merge_adapters import WEIGHTS, cold_floor, floor, make_adapters, merge_once, peak_memory_kb, shapes
from merge.catalog import METHODS

RESULTS = Path(__file__).parent / "results" / "merge_family.json"
FACTOR_GOAL, ENTRYWISE_GOAL, MEMORY_GOAL_MB = 6.0, 60.0, 1500
FLOOR_RUNS = 7
PEFT = {
    "svd": "svd",
    "cat": "cat",
    "linear": "linear_factor",
    "ties": "ties",
    "dare_linear": "dare_linear",
    "dare_ties": "dare_ties",
    "magnitude_prune": "magnitude_prune",
    "ties_svd": "ties_svd",
    "dare_linear_svd": "dare_linear_svd",
    "dare_ties_svd": "dare_ties_svd",
    "magnitude_prune_svd": "magnitude_prune_svd",
}
"""PEFT's combination types and the methods of the same meaning."""
DENSITY = 0.3


def parameters_of(method: str, rank: int) -> dict[str, Any]:
    """The output rank where there is one to choose, so that all write a file of one size."""
    return {"rank": rank} if "rank" in METHODS[method].options.model_fields else {}


def dense_floor(count: int, rank: int, layers: int) -> float:
    """CPU seconds of one pass that forms the entries of all ΔWᵢ in tiles and touches each of them once."""
    import torch

    from merge.rows import DeltaRows

    torch.set_num_threads(1)
    total = 0.0
    for (d_out, d_in), modules in Counter((d_out, d_in) for _, d_out, d_in in shapes(layers)).items():
        A, B = torch.randn(count, rank, d_in), torch.randn(count, d_out, rank)
        deltas = DeltaRows(tuple(A), tuple(B))
        next(deltas.tiles())  # compiles the loop, or loads it
        started = time.process_time()
        for _, _, tile in deltas.tiles():
            tile.mul_(2.0)
        total += modules * (time.process_time() - started)
    return total


def parts_floor(count: int, rank: int, layers: int) -> float:
    """CPU seconds of what KnOTS can not do without: forming its parts once, and selecting the border of each."""
    import torch

    from merge.memory import keep_freed_memory
    from merge.peer_options import KnotsOptions
    from merge.rows import DeltaRows, trimming

    keep_freed_memory()
    torch.set_num_threads(1)
    total = 0.0
    for (d_out, d_in), modules in Counter((d_out, d_in) for _, d_out, d_in in shapes(layers)).items():
        height = min(count * rank, d_out)
        parts = DeltaRows(tuple(torch.randn(count, rank, d_in)), tuple(torch.randn(count, height, rank)))
        passes = []
        for _ in range(4):  # the first compiles the loop, or loads it
            started = time.process_time()
            trimming(parts, KnotsOptions().density)
            passes.append(time.process_time() - started)
        total += modules * min(passes)
    return total


def warm_floor(inputs: list[Path], output: int, scratch: Path) -> tuple[float, float]:
    """Seconds and CPU seconds of a plain read and write: medians of several, for one takes milliseconds."""
    seconds, cpu_seconds = [], []
    for _ in range(FLOOR_RUNS):
        started = time.process_time()
        seconds.append(floor(inputs, output, scratch))
        cpu_seconds.append(time.process_time() - started)
    return statistics.median(seconds), statistics.median(cpu_seconds)


def family_table(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Every method on the same adapters."""
    inputs = make_adapters(scratch / "in", arguments.adapters, arguments.rank, list(shapes(arguments.layers)))
    size = sum((path / WEIGHTS).stat().st_size for path in inputs)
    output = size // arguments.adapters
    rows: dict[str, Any] = {}
    cores = os.cpu_count() or 1
    for method in arguments.methods:
        if METHODS[method].capabilities.only_adapters not in (None, arguments.adapters):
            continue
        entrywise = METHODS[method].family == "entrywise"
        runs = []
        for number in range(arguments.runs):
            base, cold = warm_floor(inputs, output, scratch), cold_floor(inputs, output, scratch)
            own = dense_floor if entrywise else parts_floor if method == "knots" else None
            dense = own(arguments.adapters, arguments.rank, arguments.layers) if own else None
            out = scratch / f"out-{method}-{number}"
            runs.append((merge_once(inputs, method, parameters_of(method, arguments.rank), out), base, dense, cold))
        rows[method] = {
            "seconds": statistics.median(run["seconds"] for run, *_ in runs),
            "cpu_seconds": statistics.median(run["cpu_seconds"] for run, *_ in runs),
            "ratio": statistics.median(run["seconds"] / base for run, (base, _), *_ in runs),
            "cpu_ratio": statistics.median(run["cpu_seconds"] / base / cores for run, (_, base), *_ in runs),
            "cold_ratio": statistics.median(run["seconds"] / cold for run, *_, cold in runs),
            "floor_cpu_seconds": statistics.median(base for _, (_, base), *_ in runs),
            "dense_cpu_seconds": statistics.median(dense for _, _, dense, _ in runs if dense) if own else None,
            "dense_ratio": statistics.median(run["cpu_seconds"] / dense for run, _, dense, _ in runs if dense)
            if own
            else None,
            "goal": ENTRYWISE_GOAL if entrywise else FACTOR_GOAL,
            "memory_above_idle_mb": max((run["peak_kb"] - run["idle_kb"]) / 1024 for run, *_ in runs),
            "relative_error": runs[0][0]["relative_error"],
        }
        print(shown(method, rows[method]), flush=True)
    return {"input_bytes": size, "cores": cores, "layers": arguments.layers, "methods": rows}


def shown(method: str, row: dict[str, Any]) -> str:
    name = "parts" if method == "knots" else "dense"
    dense = f"{row['dense_ratio']:6.1f} × {name} floor" if row["dense_ratio"] else ""
    cold = f"{row['cold_ratio']:6.1f} × cold floor (empty page cache, synced)"
    return (
        f"{method:20} {row['seconds']:8.2f} s ({row['cpu_seconds']:.2f} CPU s) {row['ratio']:8.1f} × floor "
        f"({row['cpu_ratio']:.1f} in CPU seconds; goal {row['goal']:.0f}) {dense:20} {cold} "
        f"{row['memory_above_idle_mb']:8.0f} MB   error to the sum {row['relative_error']:.3f}"
    )


def peft_table(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Stock PEFT's combination types against the same here."""
    modules = list(shapes(arguments.peft_layers))
    inputs = make_adapters(scratch / "peft", 2, arguments.rank, modules, dtype="float32")
    single = make_adapters(scratch / "peft-single", 2, arguments.rank, modules[:1], dtype="float32")
    rows: dict[str, Any] = {}
    print(f"\n{len(modules)} modules, 2 adapters: PEFT's add_weighted_adapter and the same here")
    for kind in arguments.peft_kinds:
        method, dense = PEFT[kind], kind.endswith("svd")
        command = [sys.executable, "-m", "benchmarks.merge_family", "--peft-child", kind]
        run = subprocess.run(
            [*command, *map(str, single if dense else inputs)], check=True, capture_output=True, text=True
        )
        theirs = json.loads(run.stdout.splitlines()[-1])
        parameters = parameters_of(method, arguments.rank)
        if "density" in METHODS[method].options.model_fields:
            parameters["density"] = DENSITY
        ours = merge_once(inputs, method, parameters, scratch / f"peft-{kind}")
        peft_seconds = theirs["cpu_seconds"] * (len(modules) if dense else 1)
        row = rows[kind] = {
            "at_least": dense,
            "peft_cpu_seconds": peft_seconds,
            "cpu_seconds": ours["cpu_seconds"],
            "speedup": peft_seconds / ours["cpu_seconds"],
            "peft_memory_mb": (theirs["peak_kb"] - theirs["idle_kb"]) / 1024,
            "memory_mb": (ours["peak_kb"] - ours["idle_kb"]) / 1024,
        }
        least = "≥" if dense else " "
        print(
            f"{kind:20} PEFT {least} {row['peft_cpu_seconds']:8.2f} CPU s {least} {row['peft_memory_mb']:6.0f} MB   "
            f"{method:20} {row['cpu_seconds']:7.2f} CPU s {row['memory_mb']:6.0f} MB   {least} {row['speedup']:8.1f} ×",
            flush=True,
        )
    return {"modules": len(modules), "kinds": rows}


def peft_child(kind: str, inputs: list[str]) -> None:
    """One add_weighted_adapter on a model whose frozen weights take no memory."""
    import torch
    from peft import PeftModel
    from safetensors import safe_open
    from torch import nn

    def frozen(d_out: int, d_in: int) -> nn.Linear:
        layer = nn.Linear(1, 1, bias=False)
        layer.in_features, layer.out_features = d_in, d_out
        layer.weight = nn.Parameter(torch.zeros(1, 1).expand(d_out, d_in), requires_grad=False)
        return layer

    model = nn.Module()
    with safe_open(f"{inputs[0]}/{WEIGHTS}", "pt") as file:
        present = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in file.keys()}  # noqa: SIM118
    layers = 1 + max(int(path.split(".")[2]) for path in present)
    for path, d_out, d_in in shapes(layers):
        if path in present:
            parent = model
            *folders, name = path.split(".")
            for folder in folders:
                if not hasattr(parent, folder):
                    parent.add_module(folder, nn.Module())
                parent = getattr(parent, folder)
            parent.add_module(name, frozen(d_out, d_in))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(model, inputs[0], adapter_name="a0")
        for number, path in enumerate(inputs[1:], start=1):
            merged.load_adapter(path, f"a{number}")
        names = [f"a{number}" for number in range(len(inputs))]
        density = None if kind in ("svd", "cat", "linear") else DENSITY
        idle, started = peak_memory_kb(), time.process_time()
        merged.add_weighted_adapter(names, [1.0] * len(names), "merged", combination_type=kind, density=density)
    print(json.dumps({"cpu_seconds": time.process_time() - started, "idle_kb": idle, "peak_kb": peak_memory_kb()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--methods", type=lambda text: text.split(",") if text else [], default=list(METHODS))
    parser.add_argument("--peft", action="store_true", help="compare with stock PEFT, too")
    parser.add_argument("--peft-layers", type=int, default=2)
    parser.add_argument("--peft-kinds", type=lambda text: text.split(","), default=list(PEFT))
    parser.add_argument("--peft-child", choices=PEFT, help=argparse.SUPPRESS)
    parser.add_argument("inputs", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peft_child:
        peft_child(arguments.peft_child, arguments.inputs)
        return
    with tempfile.TemporaryDirectory(prefix="rankwise-bench-") as scratch:
        table = family_table(arguments, Path(scratch))
        if arguments.peft:
            table["peft"] = peft_table(arguments, Path(scratch))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
