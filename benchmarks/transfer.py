"""Generation of inputs for a transfer against a naive loop of single prompts without a shared prefix.

    python -m benchmarks.transfer                    SmolLM2-135M-Instruct, 16 candidates of the loop, 64 of ours
    python -m benchmarks.transfer --seeds 15         a longer prompt

Both write until a line end, with the same prompt, temperature and longest length; the loop is transformers' own
`generate`, which keeps keys and values within a candidate. The two take turns. Prints tokens a second and the ratio
with its goal, by the clock and by the CPU's time, and writes benchmarks/results/transfer.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pool_figures import RESULTS, Figure, show, write

GOAL = 3.0
KEY = "benchmark"


def orders(count: int) -> list[str]:
    """Seeds: inputs of the task orders."""
    from examples.smollm2.tasks import TASKS, make_items

    return [item.prompt.replace("\n", " ") for item in make_items(TASKS["orders"], "train", count)]


class Clock:
    """Seconds and tokens of one of the two."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.tokens = 0

    def take(self, work: Callable[[], int]) -> None:
        """Time the work, which gives its number of tokens."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.tokens += work()
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu

    def detail(self) -> dict[str, float]:
        return {"tokens": self.tokens, "seconds": self.wall, "cpu_seconds": self.cpu}


def naive(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> int:
    """One candidate by transformers' generate."""
    from transformers import GenerationConfig

    given = tokenizer(prompt, return_tensors="pt")
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        stop_strings=["\n"],
    )
    written = model.generate(
        input_ids=given.input_ids, attention_mask=given.attention_mask, generation_config=config, tokenizer=tokenizer
    )
    return int(written.shape[1] - given.input_ids.shape[1])


def measure(base: Path, arguments: argparse.Namespace) -> list[Figure]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from transfer.generation import GenerationSettings, InputGenerator
    from transfer.prompts import generator_prompt
    from transfer.sampling import Sampling

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    seeds = orders(arguments.seeds)
    settings = GenerationSettings(Sampling(), arguments.max_new_tokens, arguments.batch_size)
    loop, own = Clock(), Clock()
    generators: list[InputGenerator] = []

    def batch(number: int) -> int:
        if not generators:
            generators.append(InputGenerator(model, tokenizer, seeds, settings))
        found = generators[0].batch(KEY, number)
        return sum(len(tokenizer(item.text, add_special_tokens=False)["input_ids"]) + 1 for item in found)

    prompt = generator_prompt(seeds)
    with torch.inference_mode():
        naive(model, tokenizer, prompt, 2)
    for number in range(arguments.batches):
        for _ in range(arguments.singles):
            loop.take(lambda: naive(model, tokenizer, prompt, arguments.max_new_tokens))
        own.take(lambda n=number: batch(n))  # type: ignore[misc]
    rates = [clock.tokens / clock.wall for clock in (loop, own)]
    by_cpu = [clock.tokens / clock.cpu for clock in (loop, own)]
    return [
        Figure("naive loop", rates[0], "tokens/s", detail=loop.detail()),
        Figure("transfer.generation", rates[1], "tokens/s", detail=own.detail()),
        Figure("ratio", rates[1] / rates[0], "×", GOAL, at_most=False),
        Figure("ratio of CPU time", by_cpu[1] / by_cpu[0], "×", GOAL, at_most=False),
    ]


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of another base model")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--singles", type=int, default=8, help="candidates of the loop for each batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON file")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Returns 0 when every goal was reached, else 1."""
    from examples.smollm2.base_model import base_model_directory

    arguments = parse(words)
    figures = measure(arguments.base or base_model_directory(), arguments)
    show("transfer", figures)
    options = {name: value for name, value in vars(arguments).items() if name != "results"}
    write("transfer", figures, options, arguments.results, prefix="")
    return 1 if any(figure.passed is False for figure in figures) else 0


if __name__ == "__main__":
    raise SystemExit(main())
