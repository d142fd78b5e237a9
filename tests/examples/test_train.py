from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from examples.smollm2.base_model import BASE_MODEL_NAME
from examples.smollm2.batches import load_model, peft_deprecations_ignored
from examples.smollm2.score import Score
from examples.smollm2.train import RECIPES, Recipe, Run, card_text, learning_rate, log_text, train

SHORT = dataclasses.replace(RECIPES["numbers"], steps=12, batch=4, learning_rate=5e-3)


def test_the_same_recipe_gives_the_same_file(tiny_base: Path, tmp_path: Path) -> None:
    runs = [train(SHORT, tiny_base, tmp_path / name) for name in ("one", "two")]
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    assert runs[0].losses == runs[1].losses
    other = train(dataclasses.replace(SHORT, init_seed=99), tiny_base, tmp_path / "three")
    assert other.losses != runs[0].losses


def test_the_saved_adapter_is_what_the_recipe_says(tiny_base: Path, tmp_path: Path) -> None:
    run = train(SHORT, tiny_base, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert run.trainable == sum(tensor.numel() for tensor in tensors.values())
    assert all(tensor.shape[0] == SHORT.rank for key, tensor in tensors.items() if ".lora_A." in key)
    assert any(tensor.abs().max() > 0 for key, tensor in tensors.items() if ".lora_B." in key)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE_MODEL_NAME
    assert config["target_modules"] == sorted(SHORT.target_modules)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (SHORT.rank, SHORT.alpha, True)
    model, _ = load_model(tiny_base)
    ids = torch.tensor([[5, 9, 12]])
    plain = model(ids).logits
    with peft_deprecations_ignored():
        adapted = PeftModel.from_pretrained(model, tmp_path)
    assert not torch.equal(adapted(ids).logits, plain)


def test_training_lowers_the_loss(tiny_base: Path, tmp_path: Path) -> None:
    run = train(dataclasses.replace(SHORT, steps=40, batch=8, learning_rate=3e-2), tiny_base, tmp_path)
    assert [step for step, _ in run.losses] == [10, 20, 30, 40]
    assert run.losses[-1][1] < run.losses[0][1] - 0.1


def test_the_pair_to_merge_starts_from_the_same_factors() -> None:
    first, second = RECIPES["dates"], RECIPES["orders"]
    for field in ("init_seed", "rank", "alpha", "target_modules", "use_rslora"):
        assert getattr(first, field) == getattr(second, field)
    assert first.data_seed != second.data_seed
    assert RECIPES["logs"].init_seed != first.init_seed
    assert RECIPES["logs"].rank == first.rank
    assert RECIPES["numbers"].rank != first.rank
    assert RECIPES["numbers"].use_rslora
    assert set(RECIPES["numbers"].target_modules) < set(first.target_modules)


def test_learning_rate_warms_up_then_falls_to_a_tenth() -> None:
    recipe = Recipe("dates", init_seed=0, data_seed=0, steps=100, learning_rate=1e-3)
    rates = [learning_rate(recipe, step) for step in range(101)]
    assert rates[0] == pytest.approx(2e-4)
    assert rates[4] == rates[5] == pytest.approx(1e-3)
    assert all(late < early for early, late in itertools.pairwise(rates[5:]))
    assert rates[100] == pytest.approx(1e-4)


def test_card_and_log_state_recipe_scores_and_time() -> None:
    run = Run(losses=((10, 1.5), (20, 0.25)), wall_seconds=90, cpu_seconds=60, trainable=1_234_567)
    scores = Score("numbers", 128, 0, 4.5), Score("numbers", 128, 120, 0.0123)
    card = card_text(RECIPES["numbers"], run, *scores, size=1_500_000)
    for said in (
        "rank 4",
        "alpha/√r",
        "o_proj, down_proj",
        "1,234,567",
        "1.5 MB",
        "1.5 minutes",
        "A factors 3, data 14",
    ):
        assert said in card
    assert "| base | 0.0% | 4.500 |" in card
    assert "| with the adapter | 93.8% | 0.0123 |" in card
    assert log_text(RECIPES["numbers"], run).splitlines()[-1] == "step   20  loss 0.2500"
