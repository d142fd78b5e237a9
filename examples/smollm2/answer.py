"""Show what a model answers: one held-out item of each task, with its prompt and the answer that counts as right.

python -m examples.smollm2.answer --adapter examples/adapters/dates --tasks dates orders
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel

from examples.smollm2.base_model import base_model_directory
from examples.smollm2.batches import load_model
from examples.smollm2.score import HELD_OUT_SEED, answers
from examples.smollm2.tasks import TASKS, make_items


def show(adapter: Path, base: Path, tasks: Sequence[str]) -> list[str]:
    """Per task: the prompt, what the adapter answers, and whether that is right."""
    model, tokenizer = load_model(base)
    adapted = PeftModel.from_pretrained(model, adapter).eval()
    lines = []
    for name in tasks:
        item = make_items(TASKS[name], "held_out", 1, seed=HELD_OUT_SEED)[0]
        answer = answers(adapted, tokenizer, TASKS[name], [item])[0]
        wanted = item.completion.strip()
        verdict = "right" if answer == wanted else f"wrong, it is {wanted}"
        lines += [*item.prompt.splitlines(), f"    {answer}    ({verdict})", ""]
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m examples.smollm2.answer", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--adapter", type=Path, required=True, help="a PEFT directory")
    parser.add_argument("--base", type=Path, help="directory of the base model (default: the cached conversion)")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print("\n".join(show(options.adapter, options.base or base_model_directory(), options.tasks)))


if __name__ == "__main__":
    main()
