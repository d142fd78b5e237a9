"""Score adapters on tasks: exact match of greedy answers and loss on held-out items.

    python -m examples.smollm2.score --adapter dates=examples/adapters/dates --tasks dates orders --items 64
    python -m examples.smollm2.score --adapter d=DIR1 --adapter o=DIR2 --sum both=d,o --sum lego=d,o,0.7071 \\
        --average mean=d,o --tasks dates orders --json scores.json

The base itself is always scored first.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from examples.smollm2.base_model import base_model_directory
from examples.smollm2.batches import IGNORED, completion_loss, encode, in_batches, load_model, peft_deprecations_ignored
from examples.smollm2.combine import average_factors, concatenate_factors
from examples.smollm2.tasks import TASKS, Item, Task, make_items

BASE = "base"
HELD_OUT_SEED = 1
_BATCH = 32


@dataclass(frozen=True)
class Score:
    """How one model did on one task: `correct` of `items` answers equal the completion; loss in nats per token."""

    task: str
    items: int
    correct: int
    loss: float

    @property
    def exact_match(self) -> float:
        return self.correct / self.items


def parse_answer(text: str) -> str:
    """The answer in a generated text: its first line that is not blank, without surrounding blanks."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def answers(model: Any, tokenizer: Any, task: Task, items: Sequence[Item]) -> list[str]:
    """Greedy answers, one per item."""
    found: list[str] = []
    for part in in_batches(items, _BATCH):
        prompts = tokenizer([item.prompt for item in part], padding=True, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(
                input_ids=prompts.input_ids,
                attention_mask=prompts.attention_mask,
                do_sample=False,
                max_new_tokens=task.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = output[:, prompts.input_ids.shape[1] :]
        found += [parse_answer(text) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return found


def mean_loss(model: Any, tokenizer: Any, items: Sequence[Item]) -> float:
    """Cross-entropy in nats per completion token over all items."""
    total, tokens = 0.0, 0
    for part in in_batches(items, _BATCH):
        batch = encode(tokenizer, part)
        with torch.inference_mode():
            total += float(completion_loss(model, batch, reduction="sum"))
        tokens += int((batch.labels != IGNORED).sum())
    return total / tokens


def score_model(model: Any, tokenizer: Any, tasks: Sequence[str], items: int) -> dict[str, Score]:
    """Scores of one model on `items` held-out items of each task (by name)."""
    scores: dict[str, Score] = {}
    for name in tasks:
        task = TASKS[name]
        held_out = make_items(task, "held_out", items, seed=HELD_OUT_SEED)
        given = answers(model, tokenizer, task, held_out)
        correct = sum(answer == item.completion.strip() for answer, item in zip(given, held_out, strict=True))
        scores[name] = Score(name, items, correct, mean_loss(model, tokenizer, held_out))
    return scores


@contextmanager
def with_adapter(model: Any, directory: Path) -> Iterator[Any]:
    """The model with the PEFT adapter in `directory` on it; afterwards the model is as it was."""
    with peft_deprecations_ignored():
        adapted = PeftModel.from_pretrained(model, directory).eval()
    try:
        yield adapted
    finally:
        adapted.unload()
        # PEFT warns of a second adapter when it finds the configuration of one that was unloaded.
        if hasattr(model, "peft_config"):
            del model.peft_config


def score_adapters(
    adapters: Mapping[str, Path], tasks: Sequence[str], *, items: int, base: Path | None = None
) -> dict[str, dict[str, Score]]:
    """Scores per adapter (name to PEFT directory) and task, and under the name "base" those of the untouched base.

    base: directory of the base model (default: the cached conversion, made when missing).
    Raises ValueError for an unknown task or an adapter that is called "base".
    """
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown:
        raise ValueError(f"unknown tasks {unknown}: choose from {sorted(TASKS)}")
    if BASE in adapters:
        raise ValueError(f'an adapter may not be called "{BASE}": that row holds the scores of the base itself')
    model, tokenizer = load_model(base_model_directory() if base is None else base)
    table = {BASE: score_model(model, tokenizer, tasks, items)}
    for name, directory in adapters.items():
        with with_adapter(model, directory) as adapted:
            table[name] = score_model(adapted, tokenizer, tasks, items)
    return table


def as_document(table: Mapping[str, Mapping[str, Score]]) -> dict[str, Any]:
    """The table as JSON: per model, `tasks` (exact_match, loss, …) and `loss_sum` over the tasks."""
    return {
        name: {
            "tasks": {task: {**asdict(score), "exact_match": score.exact_match} for task, score in row.items()},
            "loss_sum": sum(score.loss for score in row.values()),
        }
        for name, row in table.items()
    }


def as_text(table: Mapping[str, Mapping[str, Score]]) -> str:
    """The table as aligned text: exact match per task and the sum of the losses."""
    tasks = list(next(iter(table.values())))
    width = max(map(len, table))
    lines = [f"{'':{width}}  " + "  ".join(f"{task:>8}" for task in tasks) + f"  {'loss sum':>9}"]
    for name, row in table.items():
        cells = "  ".join(f"{row[task].exact_match:>8.1%}" for task in tasks)
        lines.append(f"{name:{width}}  {cells}  {sum(score.loss for score in row.values()):>9.4f}")
    return "\n".join(lines)


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.smollm2.score", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR", help="a PEFT directory")
    parser.add_argument("--sum", action="append", default=[], metavar="NAME=N1,N2[,SCALE]", help="scale·(ΔW1 + ΔW2)")
    parser.add_argument("--average", action="append", default=[], metavar="NAME=N1,N2", help="mean of A's, mean of B's")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--items", type=int, default=128, help="held-out items per task")
    parser.add_argument("--base", type=Path, help="directory of the base model (default: the cached conversion)")
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def _named(text: str) -> tuple[str, list[str]]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise SystemExit(f"expected NAME=VALUE, got {text!r}")
    return name, value.split(",")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    options = _parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    adapters = {name: Path(",".join(value)) for name, value in map(_named, options.adapter)}
    with tempfile.TemporaryDirectory() as folder:
        sources = dict(adapters)
        for name, (first, second, *scale) in map(_named, options.sum):
            adapters[name] = Path(folder) / f"sum-{name}"
            concatenate_factors(sources[first], sources[second], adapters[name], scale=float(scale[0]) if scale else 1)
        for name, (first, second) in map(_named, options.average):
            adapters[name] = Path(folder) / f"average-{name}"
            average_factors(sources[first], sources[second], adapters[name])
        table = score_adapters(adapters, options.tasks, items=options.items, base=options.base)
    print(as_text(table))
    if options.json:
        options.json.write_text(json.dumps(as_document(table), indent=2) + "\n")


if __name__ == "__main__":
    main()
