"""Training methods against stock PEFT of the same rank: time of a step and peak memory; and what our loop adds.

    python -m benchmarks.training                       every method of the menu, the first 6 layers of SmolLM2-135M
    python -m benchmarks.training allora bone --steps 5
    python -m benchmarks.training --layers 30           the whole model

For each line of the table the stock method (LoRA; beside a form of DoRA, DoRA; beside lora-bert, LoRA on a BERT of
3-mers whose classifier is trained too) and the method take steps on the same batches in turns, in one process; the
ratio is that of the medians. Memory is the peak of a process of its own without the libraries: base model,
preparation and three steps. The loop is compared as a whole training of LoRA: ours with its hooks against a script of
a dozen lines around transformers' Trainer.

Prints the table with its goals and writes benchmarks/results/training.json. Other work on the machine makes every
figure of time worthless.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.pool_figures import RESULTS, Figure, show, write
from benchmarks.training_cases import TRANSCRIPTS, Case, cases
from train.catalog import METHODS

LOOP_GOAL_PERCENT = 3.0
LOOP_ROUNDS = 5
MIB = 1024 * 1024
PARTS = ("steps", "memory", "loop")


@contextmanager
def base_model(path: Path | None, layers: int) -> Iterator[Path]:
    """The folder of the base model: `path`, or the first layers of SmolLM2 in a folder of their own."""
    if path is not None:
        yield path
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.smollm2.base_model import base_model_directory

    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(base_model_directory(), dtype=torch.float32)
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = len(model.model.layers)
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:layers]
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base_model_directory()).save_pretrained(folder)
        del model
        yield Path(folder)


def measure(arguments: argparse.Namespace, base: Path, folder: Path) -> list[Figure]:
    from benchmarks.training_steps import Setting

    size = (arguments.rank, arguments.rows, arguments.length, arguments.steps, arguments.threads)
    lines = cases(arguments.rank, arguments.methods)
    packed = _packed(base, arguments.rank, folder) if any(case.packed for case in lines) else None
    kmers = _kmers(folder, arguments.length) if any(case.stock == TRANSCRIPTS for case in lines) else None
    setting = Setting(base, *size, packed=packed, kmers=kmers)
    found: list[Figure] = []
    if "steps" in arguments.parts:
        found += [_step_figure(setting, case) for case in lines]
    if "memory" in arguments.parts:
        found += _memory_figures(setting, lines, arguments.memory_runs)
    if "loop" in arguments.parts:
        found.append(_loop_figure(setting))
    return found


def _packed(base: Path, rank: int, folder: Path) -> Path:
    """The base model in four bits a weight, in `folder`. How well it is quantised costs no step any time."""
    from train.options.quantisation import QuantisationOptions
    from train.quantised.engine import quantise_base

    out = folder / "packed"
    options = QuantisationOptions(rank=rank, num_iterations=2)
    report = quantise_base(base, out, options, progress=lambda fraction, message: None).to_dict()
    print(f"the packed base model: {report['bits_per_weight']:.3f} bits a weight", file=sys.stderr, flush=True)
    return out


def _kmers(folder: Path, length: int) -> Path:
    """A BERT of 3-mers in `folder`, of half the published width and a third of its layers."""
    from train.kmer_bert import KmerBertShape, write_kmer_bert

    out = folder / "kmers"
    write_kmer_bert(out, KmerBertShape(layers=4, width=384, heads=6, inner=1536, positions=max(length, 16)))
    return out


def _step_figure(setting: object, case: Case) -> Figure:
    from benchmarks.training_steps import ratio, step_times

    stock, own = step_times(setting, case)
    detail = {"stock_seconds": stock, "seconds": own, "parameters": dict(case.parameters)}
    return _told(Figure(f"{case.name}: step time", ratio(stock, own), f"× {case.stock}", case.time_goal, detail=detail))


def _memory_figures(setting: object, lines: Sequence[Case], runs: int) -> Iterator[Figure]:
    from benchmarks.training_steps import peak_memory

    stock: dict[str, list[int]] = {}
    for name in sorted({case.stock for case in lines}, reverse=True):
        stock[name] = [peak_memory(setting, name) for _ in range(runs)]
        value = statistics.median(stock[name]) / MIB
        yield _told(Figure(f"stock {name}: peak memory", value, "MiB", detail={"bytes": stock[name]}))
    for case in lines:
        own = [peak_memory(setting, case) for _ in range(runs)]
        value = statistics.median(own) / statistics.median(stock[case.stock])
        detail = {"bytes": own, "parameters": dict(case.parameters)}
        yield _told(Figure(f"{case.name}: peak memory", value, f"× {case.stock}", case.memory_goal, detail=detail))


def _loop_figure(setting: object) -> Figure:
    from benchmarks.training_steps import loop_times, ratio

    with tempfile.TemporaryDirectory() as folder:
        bare, own = loop_times(setting, LOOP_ROUNDS, Path(folder))
    detail = {"bare_seconds": bare, "seconds": own}
    value = 100 * (ratio(bare, own) - 1)
    return _told(Figure("our loop beyond a Trainer script", value, "%", LOOP_GOAL_PERCENT, detail=detail))


def _told(figure: Figure) -> Figure:
    """The same; and a sign of life, for the whole table takes a while."""
    print(f"{figure.name}: {figure.value:.3f} {figure.unit}", file=sys.stderr, flush=True)
    return figure


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="method", help="names of the menu; all by default")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=6, help="of SmolLM2, from the first")
    parser.add_argument("--base", type=Path, help="folder of another base model, whole")
    parser.add_argument("--rows", type=int, default=4, help="of a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=15, help="steps that are timed of each method")
    parser.add_argument("--memory-runs", type=int, default=3, help="processes whose peak is measured")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON file")
    arguments = parser.parse_args(words)
    unknown = sorted(set(arguments.methods) - set(METHODS))
    if unknown:
        parser.error(f"there is no training method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Returns 0 when every goal was reached, else 1."""
    arguments = parse(words)
    with base_model(arguments.base, arguments.layers) as base, tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments, base, Path(folder))
    show("training", figures)
    options = {name: value for name, value in vars(arguments).items() if name != "results"}
    write("training", figures, options, arguments.results, prefix="")
    missed = sum(figure.passed is False for figure in figures)
    print(f"\n{missed} goals were missed" if missed else "\nevery goal was reached")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
