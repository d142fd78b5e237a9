"""A whole training in this process: what it refuses, how it stops, what its evaluation says."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tiny_base import sums

from artifacts.errors import AttemptCancelled, FileBroken, ReloadMismatch, RequestInvalid, TrainingDiverged
from train.evaluation import compare
from train.settings import EvaluationSettings
from train.tasks.causal_lm import CausalScores


def test_the_same_seed_gives_the_same_adapter_and_another_one_another(trainings: Any) -> None:
    runs = [trainings.run(steps=3, seed=seed)[1] / "adapter_model.safetensors" for seed in (1, 1, 2)]
    first, again, other = (run.read_bytes() for run in runs)
    assert first == again != other


def test_nothing_of_accelerate_outlives_a_training(trainings: Any) -> None:
    """Its number of ranks is of the whole process, and the next training may have another one."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    trainings.run(steps=1, evaluation={"validation_fraction": 0})
    assert [state._shared_state for state in (PartialState, AcceleratorState, GradientState)] == [{}, {}, {}]


def test_accumulating_gives_the_gradient_of_the_large_batch(trainings: Any) -> None:
    """Completions differ in length, so a mean of means would give another gradient."""
    rows = [{"prompt": "say ", "completion": "x" * (1 + 7 * (number % 3))} for number in range(16)]
    losses = []
    for size, parts in ((16, 1), (4, 4)):
        _, _, watcher = trainings.run(
            rows=rows, evaluation={"validation_fraction": 0}, steps=3, batch_size=size, gradient_accumulation=parts
        )
        losses.append([watcher.points[step]["loss"] for step in (1, 2, 3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_loss_that_is_no_number_stops_before_it_is_used_and_names_the_step(trainings: Any) -> None:
    with pytest.raises(TrainingDiverged, match=r"The (loss|gradient norm) of step \d+ is (nan|inf)"):
        trainings.run(steps=200, learning_rate=10.0, max_grad_norm=0.0, schedule="constant")


def test_a_wish_to_stop_ends_after_the_step_with_a_checkpoint(trainings: Any, monkeypatch: Any) -> None:
    from trainings import Watcher

    watchers: list[Watcher] = []
    made = Watcher.__init__

    def remember(self: Watcher, *values: Any, **named: Any) -> None:
        made(self, *values, **named)
        watchers.append(self)

    monkeypatch.setattr(Watcher, "__init__", remember)
    with pytest.raises(AttemptCancelled, match="after step 3"):
        trainings.run(stop_at=3)
    assert (sorted(watchers[0].checkpoints), max(watchers[0].points)) == ([3], 3)


def test_nothing_is_trained_when_all_rows_are_too_long(trainings: Any) -> None:
    with pytest.raises(RequestInvalid, match="No training row is left"):
        trainings.run(task={"max_length": 3, "overlong": "drop"})
    with pytest.raises(FileBroken, match="64 rows of the dataset"):
        trainings.run(task={"max_length": 3})


def test_a_row_can_not_be_longer_than_the_base_model_was_made_for(trainings: Any) -> None:
    with pytest.raises(FileBroken, match="256 are allowed"):
        trainings.run(rows=[*sums(3), {"prompt": "a", "completion": "b" * 300}], task={"max_length": 4096})


def test_a_row_moves_neither_itself_nor_others_into_the_validation(trainings: Any) -> None:
    first, _, _ = trainings.run(rows=sums(6), steps=1)
    report, _, _ = trainings.run(rows=[*reversed(sums(6)), {"prompt": "new ", "completion": "row"}], steps=1)
    counts = [first.data["validation_rows"], report.data["validation_rows"]]
    assert counts[1] - counts[0] in (0, 1)
    assert first.data["training_rows"] + counts[0] == 36


def test_gradient_checkpointing_trains_the_same(trainings: Any) -> None:
    runs = [trainings.run(steps=3, gradient_checkpointing=value)[2].points for value in (False, True)]
    for step in (1, 2, 3):
        assert runs[0][step]["loss"] == pytest.approx(runs[1][step]["loss"], rel=1e-5)


def test_bfloat16_trains_on_the_cpu_with_a_float32_adapter(trainings: Any) -> None:
    report, adapter, _ = trainings.run(steps=12, precision="bfloat16")
    assert report.evaluation["after"]["loss"] < report.evaluation["before"]["loss"]
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "acme/tiny"


def test_an_export_that_is_not_the_trained_model_is_found_out(trainings: Any, monkeypatch: Any) -> None:
    from train.methods import peft_adapter

    true = peft_adapter.adapter_tensors

    def spoilt(model: Any) -> dict[str, Any]:
        return {name: value * 1.01 if ".lora_B." in name else value for name, value in true(model).items()}

    monkeypatch.setattr(peft_adapter, "adapter_tensors", spoilt)
    with pytest.raises(ReloadMismatch, match="logits that differ by"):
        trainings.run(steps=5)


def test_the_interval_covers_the_difference_and_shrinks_with_agreement() -> None:
    generator = np.random.default_rng(0)
    before = generator.gamma(2.0, 5.0, 400)
    tokens = generator.integers(1, 30, 400).astype(float)
    after = before - 0.1 * tokens
    exact = (generator.random(400) < 0.5).astype(float)
    settings = EvaluationSettings()
    found = compare(CausalScores(before, tokens, exact), CausalScores(after, tokens, exact), settings, 1)
    # Every row is better by 0.1 per token: no resample can say anything else.
    assert found["loss"]["difference"] == pytest.approx(-0.1)
    assert found["loss"]["low"] == pytest.approx(-0.1)
    assert found["loss"]["high"] == pytest.approx(-0.1)
    assert found["exact_match"] == {"difference": 0.0, "low": 0.0, "high": 0.0}
    noisy = after + generator.normal(0, 5, 400)
    spread = compare(CausalScores(before, tokens, None), CausalScores(noisy, tokens, None), settings, 1)["loss"]
    assert spread["low"] < spread["difference"] < spread["high"]
    assert spread["high"] - spread["low"] < 0.2
