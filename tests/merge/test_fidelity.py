"""B2 and B3 of the LoRA-LEGO spec on real adapters of a real model. Slow: minutes on two cores."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from artifacts.adapter import Adapter
from examples.smollm2.base_model import base_model_directory
from examples.smollm2.batches import peft_deprecations_ignored
from examples.smollm2.combine import average_factors
from examples.smollm2.score import load_model, mean_loss, with_adapter
from examples.smollm2.tasks import TASKS, make_items
from merge.catalog import parse_parameters
from merge.engine import merge_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"
ITEMS = 48


@pytest.fixture(scope="module")
def base() -> Path:
    return base_model_directory()


def losses(base: Path, adapters: dict[str, Path], tasks: Sequence[str]) -> dict[str, float]:
    """Summed held-out loss over the tasks, per model; "base" is the one without adapter."""
    model, tokenizer = load_model(base)
    held_out = [make_items(TASKS[task], "held_out", ITEMS) for task in tasks]
    table = {"base": sum(mean_loss(model, tokenizer, items) for items in held_out)}
    for name, directory in adapters.items():
        with with_adapter(model, directory) as adapted:
            table[name] = sum(mean_loss(adapted, tokenizer, items) for items in held_out)
    return table


@pytest.fixture
def lego(tmp_path: Path, as_input: Callable[..., Any]) -> Callable[..., Path]:
    def run(names: Sequence[str], rank: int, **parameters: Any) -> Path:
        out = tmp_path / f"lego-{'-'.join(names)}-{rank}"
        inputs = [as_input(ADAPTERS / name) for name in names]
        merge_files(inputs, "lego", parse_parameters("lego", {"rank": rank, **parameters}), out)
        return out

    return run


def test_b2_two_tasks_in_one_adapter(base: Path, lego: Callable[..., Path], tmp_path: Path) -> None:
    average_factors(ADAPTERS / "dates", ADAPTERS / "orders", tmp_path / "average")
    models = {
        "k16": lego(["dates", "orders"], 16),
        "k1": lego(["dates", "orders"], 1),
        "average": tmp_path / "average",
    }
    loss = losses(base, models, ["dates", "orders"])
    print(loss)
    assert loss["k16"] < loss["base"]
    assert loss["k16"] < loss["average"]
    assert loss["k1"] > loss["k16"]


@pytest.mark.parametrize(("rank", "dtype"), [(16, "float32"), (12, "auto")])
def test_b2_logits_of_stock_peft_equal_base_plus_delta(
    base: Path, lego: Callable[..., Path], rank: int, dtype: str
) -> None:
    """The merged adapter (the second is that of `make demo`) in stock PEFT against the base with ΔW added to it."""
    directory = lego(["dates", "orders"], rank, output_dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer("Write the date in ISO 8601: the third of May 1987", return_tensors="pt").input_ids
    # float64: what is compared is the algebra, not the rounding of thirty layers.
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        with peft_deprecations_ignored():
            by_peft = PeftModel.from_pretrained(model, directory)(ids).logits
        dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        plain = dense(ids).logits
        for path, factors in Adapter.open(directory).items():
            dense.get_submodule(path).weight += factors.scaling * factors.B.double() @ factors.A.double()
        by_hand = dense(ids).logits
    difference = float((by_peft - by_hand).abs().max())
    print(f"largest difference of a logit: {difference:.1e}")
    assert float((by_peft - plain).abs().max()) > 0.1
    assert difference < 1e-4


def random_half(source: Path, out: Path, seed: int) -> Path:
    """The adapter with half of its rank components, drawn per module; the scaling of what is kept stays alpha/r."""
    draws = random.Random(seed)
    tensors = load_file(source / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    rank = config["r"]
    kept = {}
    for key in sorted(key for key in tensors if "lora_A" in key):
        chosen = torch.tensor(sorted(draws.sample(range(rank), rank // 2)))
        kept[key] = tensors[key][chosen].contiguous()
        other = key.replace("lora_A", "lora_B")
        kept[other] = tensors[other][:, chosen].contiguous()
    out.mkdir()
    save_file(kept, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config |= {"r": rank // 2, "lora_alpha": config["lora_alpha"] / 2}
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def test_b3_pruning_one_adapter(base: Path, lego: Callable[..., Path], tmp_path: Path) -> None:
    models: dict[str, Path] = {f"k{rank}": lego(["orders"], rank) for rank in (8, 4, 2)}
    models |= {f"random{i}": random_half(ADAPTERS / "orders", tmp_path / f"random{i}", i) for i in range(5)}
    loss = losses(base, models, ["orders"])
    print(loss)
    tolerance = 0.02
    assert loss["k8"] <= loss["k4"] + tolerance
    assert loss["k4"] <= loss["k2"] + tolerance
    assert loss["k4"] < sum(loss[f"random{i}"] for i in range(5)) / 5
