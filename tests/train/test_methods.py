"""What every training method promises: it learns, resumes to the bit, and its file is what its menu entry says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from artifacts.adapter import Adapter
from artifacts.errors import RequestInvalid
from artifacts.intake import inspect
from train.catalog import METHODS

PARAMETERS: dict[str, dict[str, Any]] = {
    "adalora": {"initial_rank": 6, "target_rank": 3, "dropout": 0.1},
    "allora": {"rank": 4},
    "bone": {"rank": 8, "dropout": 0.1},
    # one round at the first step, so that the shortest training of these tests has it
    "increlora": {"target_rank": 4, "increment": 3, "layers_per_round": 14, "wait": 0, "dropout": 0.1},
    "dylora": {"rank": 4, "dropout": 0.1, "update_scope": "strict"},
    # of two layers, the one that matters more
    "flexora": {"rank": 4, "dropout": 0.1, "selection": "top_k", "top_k": 1, "validation_rows": 8},
    "inttune": {"rank": 12, "dropout": 0.1},
    "lora-sb": {"rank": 12, "dropout": 0.1, "samples": 16},
    "lora-xs": {"rank": 12, "dropout": 0.1},
    "loftq": {"rank": 4, "bits": 4, "iterations": 2},
    "lq-lora": {},
    "miss": {"rank": 8, "dropout": 0.1},
    "nlora": {"rank": 4, "dropout": 0.1, "residual": True},
    "prompt-tuning": {"virtual_tokens": 6},
    "smora": {"rank": 8, "active_rank": 4, "dropout": 0.1},
    "vera": {"rank": 32, "dropout": 0.1},
}
USUAL = {"rank": 4, "dropout": 0.1}
OF_WORDS = [name for name, row in METHODS.items() if "causal-lm" in row.capabilities.tasks]
RATES = {"increlora": 0.05, "prompt-tuning": 0.1, "vera": 0.05}
TOLERANCE = 1e-4


def digests(adapter: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(adapter.iterdir())}


@pytest.mark.parametrize("name", OF_WORDS)
def test_a_method_learns_and_goes_on_from_a_checkpoint_to_the_same_bytes(trainings: Any, name: str) -> None:
    parameters = PARAMETERS.get(name, USUAL)
    settings = {"learning_rate": RATES.get(name, 0.01)}
    report, adapter, whole = trainings.run(name, parameters, steps=12, checkpoint_steps=7, **settings)
    assert report.evaluation["after"]["loss"] < report.evaluation["before"]["loss"] - 0.3
    assert report.evaluation["difference"]["loss"]["high"] < 0
    assert report.reload["largest_difference"] <= TOLERANCE < report.reload["effect"]
    assert sorted(whole.checkpoints) == [7]
    for step, checkpoint in whole.checkpoints.items():
        again, resumed, watcher = trainings.run(name, parameters, steps=12, resume=checkpoint, **settings)
        assert again.resumed_at == step
        assert digests(resumed) == digests(adapter)
        assert watcher.points == {at: values for at, values in whole.points.items() if at > step}
        assert again.evaluation == report.evaluation

    manifest = inspect(adapter)
    row = METHODS[name].capabilities
    # LoRA with one flag set, and LoRA that can be cut to smaller ranks: intake calls them by their names
    assert manifest.method == (name if name in ("rslora", "dylora") else row.exports)
    assert manifest.mergeable is row.mergeable
    assert manifest.base_model == "acme/tiny"


def test_a_checkpoint_at_the_end_of_an_epoch_and_one_of_half_an_accumulated_batch(trainings: Any) -> None:
    """51 rows are 7 batches; with 2 of them a step, every fourth step is an epoch's last, of a single batch."""
    _, adapter, whole = trainings.run("lora", USUAL, steps=9, checkpoint_steps=4)
    assert sorted(whole.checkpoints) == [4, 8]
    for checkpoint in whole.checkpoints.values():
        assert digests(trainings.run("lora", USUAL, steps=9, resume=checkpoint)[1]) == digests(adapter)


@pytest.mark.parametrize("name", [name for name in OF_WORDS if METHODS[name].capabilities.exports == "lora"])
def test_a_plain_export_says_nothing_of_how_it_was_trained(trainings: Any, name: str) -> None:
    _, adapter, _ = trainings.run(name, PARAMETERS.get(name, USUAL), steps=2)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["init_lora_weights"] in (True, "gaussian")
    assert not config.get("use_dora")
    assert config["inference_mode"] is True
    Adapter.open(adapter)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_the_export_of_a_changed_base_has_twice_the_rank_and_no_delta_before_training(
    trainings: Any, name: str
) -> None:
    # A step so small that it moves nothing: ΔW = s·(B·A − B₀·A₀) is 0.
    _, adapter, _ = trainings.run(name, {"rank": 4}, steps=1, learning_rate=1e-12)
    opened = Adapter.open(adapter)
    for factors in opened.values():
        assert factors.A.shape[0] == 8
        delta = factors.scaling * factors.B.double() @ factors.A.double()
        assert float(delta.abs().max()) < 1e-6


def test_lora_fa_leaves_a_as_it_was(trainings: Any) -> None:
    runs = [trainings.run("lora-fa", {"rank": 4}, steps=steps)[1] for steps in (1, 5)]
    first, last = (load_file(run / "adapter_model.safetensors") for run in runs)
    for name, value in first.items():
        assert torch.equal(value, last[name]) is (".lora_A." in name), name


def test_plain_lora_moves_a_where_lora_fa_does_not(trainings: Any) -> None:
    runs = [trainings.run("lora", {"rank": 4}, steps=steps)[1] for steps in (1, 5)]
    first, last = (load_file(run / "adapter_model.safetensors") for run in runs)
    assert not any(torch.equal(value, last[name]) for name, value in first.items() if ".lora_A." in name)


def test_lora_plus_moves_b_by_the_ratio_in_the_first_step(trainings: Any) -> None:
    """Adam's first step is learning rate × sign of the gradient, so B moves `ratio` times as far as with LoRA."""
    moved = {}
    for name, parameters in (("lora", {"rank": 4}), ("lora-plus", {"rank": 4, "ratio": 8.0})):
        _, adapter, _ = trainings.run(name, parameters, steps=1, learning_rate=1e-3, schedule="constant")
        tensors = load_file(adapter / "adapter_model.safetensors")
        moved[name] = {key: value for key, value in tensors.items() if ".lora_B." in key}
    for key, value in moved["lora"].items():
        large = value.abs() > 0.9e-3  # where the gradient is far above Adam's epsilon
        assert large.any()
        torch.testing.assert_close(moved["lora-plus"][key][large], 8 * value[large], rtol=1e-2, atol=0)


def test_rslora_divides_by_the_root_of_the_rank(trainings: Any) -> None:
    _, adapter, _ = trainings.run("rslora", {"rank": 4, "alpha": 6.0}, steps=1)
    assert {factors.scaling for _, factors in Adapter.open(adapter).items()} == {3.0}


def test_adalora_ends_at_the_target_rank_on_average(trainings: Any) -> None:
    report, adapter, watcher = trainings.run("adalora", PARAMETERS["adalora"], steps=20)
    ranks = [factors.A.shape[0] for _, factors in Adapter.open(adapter).items()]
    assert watcher.points[1]["mean_rank"] == 6.0
    assert watcher.points[20]["mean_rank"] == pytest.approx(3.0, abs=0.1)
    assert sum(ranks) / report.target_modules == pytest.approx(watcher.points[20]["mean_rank"])


def test_eva_deals_out_the_same_number_of_ranks_in_all(trainings: Any) -> None:
    report, adapter, _ = trainings.run("eva", {"rank": 4}, steps=1)
    ranks = [factors.A.shape[0] for _, factors in Adapter.open(adapter).items()]
    assert sum(ranks) == 4 * report.target_modules
    assert len(set(ranks)) > 1


def test_eva_refuses_batches_that_are_too_small_for_its_directions(trainings: Any) -> None:
    with pytest.raises(RequestInvalid, match="no batch has 32 tokens") as caught:
        trainings.run("eva", {"rank": 16}, batch_size=2)
    assert caught.value.errors[0].pointer == "/training/batch_size"
