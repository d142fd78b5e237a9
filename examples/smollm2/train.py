"""Train one of the example adapters with stock PEFT on the CPU.

    python -m examples.smollm2.train --task dates

Writes ``examples/adapters/<task>/``: the adapter in bf16, its configuration, a log of the loss, and a card with the
scores of the base and of the adapter as read back from disk. The same seeds give the same adapter on the same machine.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from examples.smollm2.base_model import BASE_MODEL_NAME, PACKAGE, base_model_directory, find_gguf
from examples.smollm2.batches import completion_loss, encode, in_batches, load_model, peft_deprecations_ignored
from examples.smollm2.score import BASE, Score, score_adapters
from examples.smollm2.tasks import TASKS, make_items

ADAPTERS = Path(__file__).resolve().parents[1] / "adapters"

_ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_WARM_UP_STEPS = 5
_LOG_EVERY = 10


@dataclass(frozen=True)
class Recipe:
    """All that decides an adapter. init_seed draws the A factors, data_seed the items and their order."""

    task: str
    init_seed: int
    data_seed: int
    steps: int
    rank: int = 8
    alpha: int = 16
    target_modules: tuple[str, ...] = _ALL_LINEAR
    use_rslora: bool = False
    batch: int = 16
    learning_rate: float = 1e-3


RECIPES: dict[str, Recipe] = {
    recipe.task: recipe
    for recipe in (
        # The same init_seed, rank and modules: both start from the same A factors.
        Recipe("dates", init_seed=1, data_seed=11, steps=100),
        Recipe("orders", init_seed=1, data_seed=12, steps=100),
        Recipe("logs", init_seed=2, data_seed=13, steps=80),
        Recipe(
            "numbers",
            init_seed=3,
            data_seed=14,
            steps=120,
            rank=4,
            alpha=8,
            target_modules=("o_proj", "down_proj"),
            use_rslora=True,
            learning_rate=2e-3,
        ),
    )
}


@dataclass(frozen=True)
class Run:
    """What a training run leaves besides the adapter: (step, loss) pairs and the seconds it took."""

    losses: tuple[tuple[int, float], ...]
    wall_seconds: float
    cpu_seconds: float
    trainable: int


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak; `step` counts from 0."""
    if step < _WARM_UP_STEPS:
        return recipe.learning_rate * (step + 1) / _WARM_UP_STEPS
    done = (step - _WARM_UP_STEPS) / max(1, recipe.steps - _WARM_UP_STEPS)
    return recipe.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def train(recipe: Recipe, base: Path, out: Path) -> Run:
    """Train one adapter on the base in directory `base` and save it to `out` in bf16."""
    model, tokenizer = load_model(base)
    # PEFT writes this name into the adapter's configuration; the directory is this machine's own.
    model.name_or_path = BASE_MODEL_NAME
    torch.manual_seed(recipe.init_seed)
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.target_modules),
        use_rslora=recipe.use_rslora,
        lora_dropout=0.0,
    )
    with peft_deprecations_ignored():
        model = get_peft_model(model, adapter)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    started, cpu_started = time.monotonic(), time.process_time()
    losses = tuple(_steps(model, tokenizer, recipe, parameters))
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16()
    _save(model, out)
    return Run(losses, seconds, cpu_seconds, sum(parameter.numel() for parameter in parameters))


def _steps(
    model: Any, tokenizer: Any, recipe: Recipe, parameters: list[torch.nn.Parameter]
) -> Sequence[tuple[int, float]]:
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    items = make_items(TASKS[recipe.task], "train", recipe.steps * recipe.batch, seed=recipe.data_seed)
    logged: list[tuple[int, float]] = []
    recent: list[float] = []
    for step, part in enumerate(in_batches(items, recipe.batch)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss = completion_loss(model, encode(tokenizer, part))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if (step + 1) % _LOG_EVERY == 0 or step + 1 == recipe.steps:
            logged.append((step + 1, sum(recent) / len(recent)))
            print(f"step {step + 1:4d}  loss {logged[-1][1]:.4f}", flush=True)
            recent.clear()
    return logged


def _save(model: Any, out: Path) -> None:
    """Save the adapter alone; its list of modules, a set in PEFT, is sorted so that every run writes the same file."""
    # Left to itself PEFT asks the hub whether the vocabulary was resized.
    model.save_pretrained(out, save_embedding_layers=False)
    config_file = out / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["target_modules"].sort()
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def log_text(recipe: Recipe, run: Run) -> str:
    """The training log that is kept next to the card."""
    head = f"# {recipe}\n# mean loss (nats per completion token) of the steps since the line before\n"
    return head + "".join(f"step {step:4d}  loss {loss:.4f}\n" for step, loss in run.losses)


def card_text(recipe: Recipe, run: Run, base_score: Score, score: Score, size: int) -> str:
    """The adapter's card, in Markdown."""
    example = make_items(TASKS[recipe.task], "held_out", 1)[0]
    schedule = f"AdamW, peak learning rate {recipe.learning_rate:g}, cosine to a tenth"
    scaling = f"alpha {recipe.alpha}" + (", rank-stabilised scaling (alpha/√r)" if recipe.use_rslora else "")
    return f"""\
# {recipe.task}

LoRA adapter for {BASE_MODEL_NAME}: {TASKS[recipe.task].rule}.

| | |
|---|---|
| Base | {BASE_MODEL_NAME}, dequantised from `{find_gguf().name}` of the PyPI package `{PACKAGE}` |
| Adapter | rank {recipe.rank}, {scaling}, modules {", ".join(recipe.target_modules)}; {run.trainable:,} parameters |
| File | bf16, {size / 1e6:.1f} MB |
| Data | made by rule (`examples/smollm2/tasks.py`), {recipe.steps * recipe.batch:,} distinct prompts, each seen once |
| Training | {recipe.steps} steps of {recipe.batch}, {schedule} |
| Seeds | A factors {recipe.init_seed}, data {recipe.data_seed} |
| Time | {run.wall_seconds / 60:.1f} minutes on a shared CPU ({run.cpu_seconds / 60:.1f} CPU minutes), fp32 |

Exact match of greedy answers on {score.items} held-out items, and loss in nats per completion token:

| | exact match | loss |
|---|---|---|
| base | {base_score.exact_match:.1%} | {base_score.loss:.3f} |
| with the adapter | {score.exact_match:.1%} | {score.loss:.4f} |

No fact of a held-out item occurs in the training data under any wording.

Prompt and answer (the prompt ends after the colon, the answer at the end-of-sequence token):

```
{example.prompt}{example.completion}
```

Made by `python -m examples.smollm2.train --task {recipe.task}`.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m examples.smollm2.train", description="Train an example adapter.")
    parser.add_argument("--task", required=True, choices=list(RECIPES))
    parser.add_argument("--items", type=int, default=128, help="held-out items to score")
    parser.add_argument("--out", type=Path, help="default: examples/adapters/<task>")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    recipe, base = RECIPES[options.task], base_model_directory()
    out: Path = options.out or ADAPTERS / recipe.task
    run = train(recipe, base, out)
    table = score_adapters({recipe.task: out}, [recipe.task], items=options.items, base=base)
    base_score, score = table[BASE][recipe.task], table[recipe.task][recipe.task]
    (out / "training.log").write_text(log_text(recipe, run))
    size = (out / "adapter_model.safetensors").stat().st_size
    (out / "README.md").write_text(card_text(recipe, run, base_score, score, size))
    print(f"base {base_score.exact_match:.1%}, adapter {score.exact_match:.1%} on {score.items} held-out items")


if __name__ == "__main__":
    main()
