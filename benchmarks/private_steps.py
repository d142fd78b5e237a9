"""A client's step with DP-SGD beside the same step without, in turns: the goal is at most 2.5 times the time.

Every row is in every batch (q = 1), so that both do the same rows.

    python -m benchmarks.private_steps
    python -m benchmarks.private_steps --layers 2 --rows 2 --length 16 --rounds 1 --steps 1
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GOAL = 2.5
RESULTS = Path(__file__).parent / "results"


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of each kind, and the ratio of their medians."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from train.catalog import find_method, parse_parameters
    from train.engine import linear_layers
    from train.federation.local_steps import LocalPlan, Noise, train_locally
    from train.federation.run import row_losses
    from train.protocol import MethodContext
    from train.settings import TrainingSettings
    from train.targets import resolve_targets

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(arguments.base, num_hidden_layers=arguments.layers)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.base, config=config, dtype=torch.float32)
    settings = TrainingSettings(batch_size=arguments.rows, learning_rate=1e-4, optimizer="sgd", schedule="constant")
    targets = resolve_targets(linear_layers(model), "all-linear")
    context = MethodContext(
        [target.path for target in targets], total_steps=1, batches=lambda: iter(()), settings=settings
    )
    method = find_method("ffa-lora").load(parse_parameters("ffa-lora", {"rank": arguments.rank}))
    prepared = method.prepare(model.requires_grad_(False), context)
    rows = torch.randint(1, config.vocab_size, (arguments.rows, arguments.length))

    def losses(used: Any, chosen: Sequence[int]) -> Any:
        ids = rows[list(chosen)]
        logits = used(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return row_losses(logits[:, :-1], ids[:, 1:])

    def seconds(noise: Noise | None) -> float:
        plan = LocalPlan(settings, arguments.steps, 0, arguments.steps, 1, arguments.rows, noise)
        began = time.perf_counter()
        train_locally(prepared, range(arguments.rows), losses, plan)
        return (time.perf_counter() - began) / arguments.steps

    kinds = {"plain": None, "private": Noise(1.0, 2.0, 1.0, seed=1)}
    for noise in kinds.values():
        seconds(noise)
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(arguments.rounds):
        for name, noise in kinds.items():
            times[name].append(seconds(noise))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {"seconds": times, "ratio": medians["private"] / medians["plain"], "goal": GOAL}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of the base model; SmolLM2 by default")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4, help="of a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=3, help="of each kind in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON file")
    arguments = parser.parse_args(words)
    if arguments.base is None:
        from examples.smollm2.base_model import base_model_directory

        arguments.base = base_model_directory()
    found = measure(arguments)
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "private_steps.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"a private step takes {found['ratio']:.2f} times a plain one; the goal is {GOAL:g} or less")
    return 0 if found["ratio"] <= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
