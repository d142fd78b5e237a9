"""The adapters in examples/adapters: their files say what the recipes say, and each does its task."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from examples.smollm2.base_model import BASE_MODEL_NAME
from examples.smollm2.combine import average_factors, concatenate_factors
from examples.smollm2.score import BASE, score_adapters
from examples.smollm2.train import ADAPTERS, RECIPES

NAMES = sorted(RECIPES)
LARGEST = 6_000_000
ITEMS = 64
FEWER_ITEMS = 24
PAIR = ("dates", "orders")


def _tensors(name: str) -> dict[str, torch.Tensor]:
    with safe_open(ADAPTERS / name / "adapter_model.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_one_adapter_per_recipe() -> None:
    assert sorted(path.name for path in ADAPTERS.iterdir()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_small_finite_bf16_of_the_recipe_rank(name: str) -> None:
    assert (ADAPTERS / name / "adapter_model.safetensors").stat().st_size <= LARGEST
    recipe, tensors = RECIPES[name], _tensors(name)
    modules = {key.split(".")[-3] for key in tensors}
    assert modules == set(recipe.target_modules)
    assert len(tensors) == 2 * 30 * len(recipe.target_modules)
    for key, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.isfinite().all()
        assert tensor.abs().max() > 0
        assert tensor.shape[0 if ".lora_A." in key else 1] == recipe.rank


@pytest.mark.parametrize("name", NAMES)
def test_configuration_is_the_recipe_and_names_no_directory(name: str) -> None:
    recipe = RECIPES[name]
    config = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE_MODEL_NAME
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (recipe.rank, recipe.alpha, recipe.use_rslora)
    assert config["target_modules"] == sorted(recipe.target_modules)
    assert config["peft_type"] == "LORA"


@pytest.mark.parametrize("name", NAMES)
def test_card_and_log_are_there(name: str) -> None:
    recipe = RECIPES[name]
    card = (ADAPTERS / name / "README.md").read_text()
    assert f"| Training | {recipe.steps} steps of {recipe.batch}," in card
    assert f"| Seeds | A factors {recipe.init_seed}, data {recipe.data_seed} |" in card
    assert "| base | " in card
    log = (ADAPTERS / name / "training.log").read_text()
    assert log.startswith(f"# {recipe}\n")
    assert f"step {recipe.steps:4d}  loss " in log.splitlines()[-1]


def test_the_pair_shares_its_start_and_the_third_does_not() -> None:
    # Training moves A little, so a shared draw of A still shows as a high cosine of the flattened factors.
    first, second, other = (_tensors(name) for name in ("dates", "orders", "logs"))
    assert _cosine_of_a(first, second) > 0.5
    assert abs(_cosine_of_a(first, other)) < 0.1


def _cosine_of_a(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    keys = [key for key in one if ".lora_A." in key]
    flat = [torch.cat([tensors[key].float().flatten() for key in keys]) for tensors in (one, two)]
    return float(torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_adapter_does_its_task_and_the_base_does_not(name: str) -> None:
    table = score_adapters({name: ADAPTERS / name}, [name], items=ITEMS)
    assert table[BASE][name].exact_match < 0.15
    assert table[name][name].exact_match > 0.85
    assert table[name][name].loss < 0.1 * table[BASE][name].loss


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_pair_merges_better_by_lego_than_by_averaging_factors(tmp_path: Path) -> None:
    first, second = (ADAPTERS / name for name in PAIR)
    # With as many clusters as components every cluster is one component: LEGO is then √(r/2r) times the sum.
    concatenate_factors(first, second, tmp_path / "lego", scale=math.sqrt(0.5))
    average_factors(first, second, tmp_path / "average")
    table = score_adapters({n: tmp_path / n for n in ("lego", "average")}, PAIR, items=FEWER_ITEMS)
    loss = {name: sum(score.loss for score in row.values()) for name, row in table.items()}
    assert loss["lego"] < loss["average"] < loss[BASE]
    assert all(score.exact_match >= 0.7 for score in table["lego"].values())
