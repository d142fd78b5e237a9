"""Every arm of a transfer from SmolLM2-135M-Instruct to Gemma-3-270M, measured on held-out messages in one run.

    python -m examples.cross_family.measure                          the task orders, and the teacher in another code
    python -m examples.cross_family.measure --code hard              a rule that five examples do not tell
    python -m examples.cross_family.measure --arms filtered unfiltered seeds-only

Needs `make setup-slow`. Prints a table and writes it as JSON to --out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.cross_family.orders import CODES, parse
from examples.cross_family.pair import Pair, Size, shuffled, unrelated

ARMS = ("filtered", "unfiltered", "seeds-only", "two-seeds", "random-text", "teacher-swap", "shuffled")
TRAINING_FREE = ("copy", "cross-lora", "lora-x", "prolora")
OTHER = {"city_first": "quantity_first", "quantity_first": "city_first", "hard": "city_first"}


class Results:
    """Rows of the table, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._began = time.process_time()

    def add(self, arm: str, score: float | None, note: str = "", **detail: Any) -> None:
        now = time.process_time()
        row = {"arm": arm, "exact_match": score, "note": note, "cpu_seconds": round(now - self._began, 1), **detail}
        self._began = now
        self.rows.append(row)
        shown = "       " if score is None else f"{score:7.1%}"
        print(f"{arm:24} {shown} {row['cpu_seconds']:7.1f} CPU s  {note}", flush=True)


def measure(pair: Pair, arms: Sequence[str], results: Results) -> None:
    """Each arm's share of exact answers on the held-out messages."""
    pair.teacher(pair.code)
    results.add("training of the source", None)
    _, report = pair.discriminator
    told = f"AUC {report.auc:.3f}, real accepted {report.accepted:.0%}, invented rejected {report.rejected:.0%}"
    results.add("discriminator", None, told, report=report.to_dict())
    if "filtered" in arms:
        _filtered(pair, results, arms)
    if "two-seeds" in arms:
        found = pair.run("two-seeds", shown=2, controls=["seeds-only"])
        results.add("transferred from two seeds", _score(found.report, "transferred"), _labels(found.report))
        results.add("two seeds only", _score(found.report, "seeds-only"))
    if "teacher-swap" in arms:
        code = OTHER[pair.code]
        few = pair.settings(pair.size.control_steps)
        found = pair.run("swap", code=code, measured=False, prompts_of="filtered", training=few)
        answered = pair.written(found.adapter)
        own, old = pair.share(answered, code), pair.share(answered, pair.code)
        results.add(f"teacher in {code}", own, f"answers in {pair.code}: {old:.1%}", old_code=old)
    if "random-text" in arms:
        text = unrelated(pair.size.rows)
        few = pair.settings(pair.size.control_steps)
        found = pair.run("random", "refresh", inputs=text, training=few)
        results.add("random text, labelled", _score(found.report, "transferred"), _labels(found.report))
    if "shuffled" in arms:
        _, blind = pair.discriminate(shuffled(pair.inputs), "shuffled")
        results.add("shuffled discriminator", None, f"AUC {blind.auc:.3f}", report=blind.to_dict())
    if "unfiltered" in arms:
        found = pair.run("unfiltered", filter="none")
        results.add("unfiltered synthetic", _score(found.report, "transferred"))


def _filtered(pair: Pair, results: Results, arms: Sequence[str]) -> None:
    controls = (*TRAINING_FREE, *(["seeds-only"] if "seeds-only" in arms else []))
    report = pair.run("filtered", controls=controls).report
    drawn, likeness = report["inputs"], report["likeness"]
    note = (
        f"{drawn['accepted']} of {drawn['scored']} accepted, {drawn['kept']} kept; MMD² {likeness['mmd2_kept']:.4f} "
        f"kept, {likeness['mmd2_unfiltered']:.4f} all; {_labels(report)}; {_right(pair)}"
    )
    spent = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in pair.observer.cpu.items())
    results.add("transfer and controls", None, f"CPU seconds: {spent}", report=report)
    for name, arm in report["evaluation"]["arms"].items():
        if "score" not in arm:
            results.add(name, None, f"refused: {arm['reason']}")
        elif name == "transferred":
            results.add(name, arm["score"]["rate"], note, report=report)
        else:
            results.add(name, arm["score"]["rate"])


def _score(report: Any, arm: str) -> float:
    return float(report["evaluation"]["arms"][arm]["score"]["rate"])


def _labels(report: Any) -> str:
    labels = report["labels"]
    return f"{labels['kept']} of {labels['labelled']} answers learnt, {labels['distinct']} different"


def _right(pair: Pair) -> str:
    known = [(CODES[pair.code](order), answer) for text, answer in pair.synthetic("filtered") if (order := parse(text))]
    right = sum(wanted.strip() == answer.strip() for wanted, answer in known)
    return f"{len(known)} inputs parse, the teacher is right on {right}"


def main(words: Sequence[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    from examples.gemma3.base_model import base_model_directory as gemma
    from examples.smollm2.base_model import base_model_directory as smollm2

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Size()
    parser.add_argument("--code", choices=list(CODES), default="city_first")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    for name in (
        "rows",
        "candidates",
        "source_steps",
        "discriminator_steps",
        "invented",
        "target_steps",
        "control_steps",
        "held_out",
        "train_rows",
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, help="keeps what is made, and goes on with it (default: a temporary one)"
    )
    parser.add_argument("--out", type=Path, help="the table as JSON")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    sizes = {name: getattr(options, name) for name in Size.__dataclass_fields__ if hasattr(options, name)}
    results = Results()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        measure(Pair(folder, smollm2(), gemma(), options.code, Size(**sizes)), options.arms, results)
    if options.out is not None:
        options.out.write_text(json.dumps(results.rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
