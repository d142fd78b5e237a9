"""Every merge method on two tasks: what the merged adapter of dates and orders still answers.

    python -m examples.smollm2.merge_table                      all methods of the menu, 64 held-out items of each task
    python -m examples.smollm2.merge_table --methods svd lego --items 128 --markdown table.md

All methods merge the same two adapters with weight 1 and their default parameters, in one comparison (as
`POST /merge/compare` does); a method with a choice of rules has a row for each of them. Then the base model answers
with each result. About 20 CPU minutes. `seconds` are those of the merge alone.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from app.cli.local_merge import take_in
from examples.smollm2.base_model import base_model_directory
from examples.smollm2.batches import load_model
from examples.smollm2.score import score_model, with_adapter
from merge.catalog import METHODS, parse_parameters
from merge.comparison import Candidate, compare_files
from merge.comparison_report import comparison_report

ADAPTERS = Path(__file__).resolve().parents[1] / "adapters"
TASKS = ("dates", "orders")
COLUMNS = ("method", "rank", "error", "dates", "orders", "mean", "seconds")


def candidates(methods: Sequence[str]) -> list[Candidate]:
    """One for each method, or for each of its rules."""
    found = []
    for method in methods:
        rule = METHODS[method].options.model_fields.get("rule")
        chosen: list[dict[str, Any]] = [{}] if rule is None else [{"rule": name} for name in get_args(rule.annotation)]
        for parameters in chosen:
            label = " ".join((method, *parameters.values()))
            found.append(Candidate(label, method, parse_parameters(method, parameters)))
    return found


def measure(methods: Sequence[str], items: int, folder: Path) -> list[dict[str, Any]]:
    """A row for the base model, for each adapter alone and for each candidate, printed as they come."""
    sources = [ADAPTERS / task for task in TASKS]
    taken = take_in(sources, [1.0] * len(sources), folder, lambda _fraction, _message: None)
    compared = compare_files(taken, candidates(methods), folder / "compared")
    report = comparison_report(compared, 0.0)
    model, tokenizer = load_model(base_model_directory())
    rows: list[dict[str, Any]] = []

    def add(label: str, measured: Any, **known: Any) -> None:
        found = score_model(measured, tokenizer, TASKS, items)
        scores = {task: found[task].exact_match for task in TASKS}
        rows.append({"method": label, **known, **scores, "mean": sum(scores.values()) / len(scores)})
        print(_line(rows[-1]), flush=True)

    print(_line({name: name for name in COLUMNS}))
    add("base model", model)
    for task, source in zip(TASKS, sources, strict=True):
        with with_adapter(model, source) as adapted:
            add(f"{task} alone", adapted)
    for item, row in zip(compared, report["candidates"], strict=True):
        with with_adapter(model, item.directory) as adapted:
            add(row["label"], adapted, rank=row["rank"], error=row["relative_error"], seconds=row["seconds"])
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table for a page, the best mean first below the base model and the adapters alone."""
    alone = [row for row in rows if "rank" not in row]
    merged = sorted((row for row in rows if "rank" in row), key=lambda row: -row["mean"])
    cells = [[_cell(name, row.get(name)) for name in COLUMNS] for row in (*alone, *merged)]
    lines = ["| " + " | ".join(line) + " |" for line in (list(COLUMNS), ["---"] * len(COLUMNS), *cells)]
    return "\n".join(lines) + "\n"


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name in (*TASKS, "mean") and not isinstance(value, str):
        return f"{value:.1%}"
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _line(row: dict[str, Any]) -> str:
    return f"{row['method']:22}" + "".join(f"{_cell(name, row.get(name)):>9}" for name in COLUMNS[1:])


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--items", type=int, default=64, help="held-out items of each task")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options.methods, options.items, Path(folder))
    if options.markdown:
        options.markdown.write_text(markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
