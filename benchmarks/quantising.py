"""How long LQ-LoRA takes to put a base model into a few bits, matrix by matrix, and what the packed model then takes.

    python -m benchmarks.quantising                          the 36 matrices of all-MiniLM-L6-v2 within 2.75 bits
    python -m benchmarks.quantising --layers 1 --rank 8      those of its first layer
    python -m benchmarks.quantising --base FOLDER --targets all-linear

Every format of the grid (144) is tried on every matrix, then an integer program chooses, then each matrix is decomposed
in its format and written: the job of `POST /models/{id}/quantize`. The result is loaded, and the memory of its
packed weights counted. Prints the table with its goals and writes benchmarks/results/quantising.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.merge_adapters import peak_memory_kb
from benchmarks.pool_figures import RESULTS, Figure, show, write

GOAL_MINUTES = 10.0
"""Of the whole model on two cores."""
GOAL_RESIDENT = 1.05
"""Bytes that the packed weights take in memory, beside their bits by the formula."""
TARGETS = ("query", "key", "value", "output.dense", "intermediate.dense")


@dataclass
class Clock:
    """Follows the progress: seconds of the wall and of the CPU for each of its messages."""

    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    _last: tuple[str, float, float] | None = None

    def __call__(self, fraction: float, message: str) -> None:
        if self._last is not None and self._last[0] == message:
            return
        self.stop()
        self._last = (message, time.perf_counter(), time.process_time())
        print(f"{fraction:4.0%} {message}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        if self._last is not None:
            message, wall, cpu = self._last
            self.seconds[message] = (time.perf_counter() - wall, time.process_time() - cpu)
            self._last = None

    def total(self, beginning: str) -> tuple[float, float]:
        """Of all messages that begin so."""
        found = [times for message, times in self.seconds.items() if message.startswith(beginning)]
        return sum(wall for wall, _ in found), sum(cpu for _, cpu in found)


def measure(arguments: argparse.Namespace, base: Path, folder: Path) -> list[Figure]:
    import torch

    from train.options.quantisation import QuantisationOptions
    from train.quantised.engine import quantise_base
    from train.quantised.source_weights import SourceWeights
    from train.targets import resolve_targets

    torch.set_num_threads(arguments.threads)
    wanted = arguments.targets if arguments.targets != ["all-linear"] else "all-linear"
    paths = [target.path for target in resolve_targets(SourceWeights(base).linear(), wanted)]
    if arguments.layers is not None:
        numbers = tuple(f".{number}." for number in range(arguments.layers))
        paths = [path for path in paths if any(number in path for number in numbers)]
    options = QuantisationOptions(rank=arguments.rank, budget_bits=arguments.budget, target_modules=paths)
    clock = Clock()
    began, cpu_began = time.perf_counter(), time.process_time()
    report = quantise_base(base, folder, options, progress=clock).to_dict()
    clock.stop()
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    (search, search_cpu), (last, last_cpu) = clock.total("trying"), clock.total("quantising")
    allocation = report["allocation"]
    detail = {"seconds": {message: {"wall": wall, "cpu": cpu} for message, (wall, cpu) in clock.seconds.items()}}
    whole = arguments.layers is None
    return [
        Figure("matrices", len(paths), ""),
        Figure("the whole", wall / 60, "min", GOAL_MINUTES if whole else None, detail=detail),
        Figure("the whole, of the CPU", cpu / 60, "min"),
        Figure("a matrix, all formats", search / len(paths), "s", detail={"cpu": search_cpu / len(paths)}),
        Figure("a matrix, its own format", last / len(paths), "s", detail={"cpu": last_cpu / len(paths)}),
        Figure("peak memory, with the libraries", peak_memory_kb() / 1024, "MiB"),
        Figure("bits per weight", report["bits_per_weight"], "", arguments.budget),
        Figure("error of the best mix", allocation["cost"], "", allocation["cost_of_best_single_format"]),
        _resident(folder, report),
    ]


def _resident(folder: Path, report: dict[str, Any]) -> Figure:
    """Of all tensors that the packed layers of the loaded model hold, but for their biases."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    import train.quantised.loading  # noqa: F401 (teaches transformers packed weights)
    from train.quantised.packed_linear import PackedLinear

    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    assert len(layers) == report["matrices"]
    held = sum(buffer.untyped_storage().nbytes() for layer in layers for buffer in layer.buffers())
    formula = report["bits_per_weight"] * report["weights"] / 8
    detail = {"bytes": held, "bytes_by_the_formula": formula, "float32_bytes": 4 * report["weights"]}
    return Figure("packed weights in memory", held / formula, "× bits", GOAL_RESIDENT, detail=detail)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of another base model")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), help="ends of the paths of the matrices")
    parser.add_argument("--layers", type=int, help="only the first so many of the base model")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--budget", type=float, default=2.75, help="bits per weight")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON file")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Returns 0 when every goal was reached, else 1."""
    arguments = parse(words)
    if arguments.base is None:
        from examples.minilm.base_model import base_model_directory

        arguments.base = base_model_directory()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments, arguments.base, Path(folder) / "quantised")
    show("quantising", figures)
    options = {name: value for name, value in vars(arguments).items() if name != "results"}
    write("quantising", figures, options, arguments.results, prefix="")
    return 1 if any(figure.passed is False for figure in figures) else 0


if __name__ == "__main__":
    raise SystemExit(main())
