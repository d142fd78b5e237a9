"""Early stopping: what is measured, when it ends, which step's adapter comes out, and that it resumes to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_methods import digests
from tiny_base import moods

from artifacts.errors import AttemptCancelled, RequestInvalid
from train.early_stopping import BestStep
from train.evaluation import Scores
from train.metrics import HIGHER_IS_BETTER
from train.settings import TASKS, EarlyStopping
from train.tasks.causal_lm import CausalScores
from train.tasks.class_scores import ClassScores
from train.tasks.text_to_image import ImageScores
from train.tasks.transcript_scores import TranscriptScores
from train.world import World

STOPPING = {"every_steps": 3, "patience": 2}
# Few rows, learnt by heart: the training loss falls on while the validation loss rises.
OVERFIT = {"steps": 60, "learning_rate": 0.03, "schedule": "constant", "gradient_accumulation": 1}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [{"prompt": f"{number} is ", "completion": f"{number * 7919 % 997:03d}"} for number in range(24)]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("lora", {"rank": 4, "dropout": 0.1}),
        pytest.param("adalora", {"initial_rank": 4, "target_rank": 2}, marks=pytest.mark.slow),
    ],
)
def test_the_best_step_comes_out_and_resumes_to_the_same_bytes(
    trainings: Any, rows: list[dict[str, Any]], method: str, parameters: dict[str, Any]
) -> None:
    settings = OVERFIT | {"early_stopping": STOPPING}
    report, adapter, whole = trainings.run(method, parameters, rows=rows, checkpoint_steps=5, **settings)
    found = report.early_stopping
    best, stopped_at = found["best_step"], report.steps
    assert found["stopped"] is True
    assert stopped_at == best + 6 < 60
    measured = {item["step"]: item["value"] for item in found["measured"]}
    assert list(measured) == list(range(3, stopped_at + 1, 3))
    assert min(measured, key=lambda step: measured[step]) == best
    assert found["best"] == measured[best]
    assert {step: values.get("validation_loss") for step, values in whole.points.items() if step % 3 == 0} == measured
    # "After" is the written file, loaded by PEFT onto a fresh base.
    assert report.evaluation["after"]["loss"] == pytest.approx(found["best"], abs=1e-5)
    _, short, _ = trainings.run(method, parameters, rows=rows, **OVERFIT | {"steps": 60, "early_stopping": None})
    assert digests(short) != digests(adapter)
    for step in (max(whole.checkpoints), min(whole.checkpoints)):
        again, resumed, _ = trainings.run(method, parameters, rows=rows, resume=whole.checkpoints[step], **settings)
        assert again.resumed_at == step
        assert digests(resumed) == digests(adapter)
        assert again.early_stopping == found


def test_measuring_changes_nothing_of_the_training(trainings: Any, rows: list[dict[str, Any]]) -> None:
    runs = []
    for stopping in (None, {"every_steps": 2, "patience": 100}):
        _, _, watcher = trainings.run(
            "lora", {"rank": 4, "dropout": 0.1}, rows=rows, **OVERFIT | {"steps": 8, "early_stopping": stopping}
        )
        runs.append([watcher.points[step]["loss"] for step in range(1, 9)])
    assert runs[0] == runs[1]


def test_a_gain_below_min_delta_does_not_count(trainings: Any, rows: list[dict[str, Any]]) -> None:
    stopping = {"every_steps": 1, "patience": 2, "min_delta": 1e6}
    report, _, _ = trainings.run("lora", rows=rows, **OVERFIT | {"early_stopping": stopping})
    assert (report.steps, report.early_stopping["best_step"]) == (3, 1)


def test_the_last_step_is_measured_too_and_all_steps_are_done_without_a_reason_to_stop(trainings: Any) -> None:
    report, _, _ = trainings.run("lora", steps=5, early_stopping={"every_steps": 3, "patience": 9})
    assert [item["step"] for item in report.early_stopping["measured"]] == [3, 5]
    assert (report.steps, report.early_stopping["stopped"]) == (5, False)


def test_a_stop_at_the_very_last_step_is_taken_up_with_nothing_left_to_do(trainings: Any) -> None:
    """Nine steps are no whole number of epochs: the loop must not begin another one."""
    stop_at = 9
    settings = {"steps": 9, "early_stopping": None}
    whole, adapter, _ = trainings.run("lora", {"rank": 4}, **settings)
    folder = trainings.folder / f"run-{trainings.count + 1}"
    with pytest.raises(AttemptCancelled, match=f"after step {stop_at}"):
        trainings.run("lora", {"rank": 4}, stop_at=stop_at, **settings)
    report, resumed, _ = trainings.run("lora", {"rank": 4}, resume=folder / f"kept-{stop_at}", **settings)
    assert (report.steps, report.resumed_at, report.final_loss) == (9, stop_at, whole.final_loss)
    assert digests(resumed) == digests(adapter)


def test_the_exported_factors_are_those_of_the_best_step(trainings: Any, rows: list[dict[str, Any]]) -> None:
    settings = OVERFIT | {"early_stopping": STOPPING}
    report, adapter, _ = trainings.run("lora", {"rank": 4}, rows=rows, **settings)
    best = report.early_stopping["best_step"]
    _, exact, _ = trainings.run("lora", {"rank": 4}, rows=rows, **OVERFIT | {"steps": best})
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, exact))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


ONE, CLASS = np.ones(1), np.zeros(1, np.int64)
MEASURED: dict[str, Scores] = {
    "causal-lm": CausalScores(ONE, ONE, ONE),
    "sequence-classification": ClassScores(1, 2, CLASS, CLASS, CLASS, ONE),
    "token-classification": ClassScores(1, 2, CLASS, CLASS, CLASS, ONE),
    "transcript-classification": TranscriptScores(1, CLASS, CLASS, CLASS, ONE),
    "text-to-image": ImageScores(ONE),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_measures_what_it_says(task: str) -> None:
    metrics = TASKS[task].metrics
    assert list(MEASURED[task].to_dict()) == list(metrics)
    assert set(metrics) <= HIGHER_IS_BETTER.keys()


class NothingToKeep:
    """A method without a state."""

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("metric", HIGHER_IS_BETTER)
def test_the_best_is_the_largest_or_the_smallest_by_the_metric(metric: Any, tmp_path: Path) -> None:
    figures = iter([0.5, 0.9, 0.1, 0.4])
    settings = EarlyStopping(metric=metric, every_steps=1, patience=4)
    method: Any = NothingToKeep()
    best = BestStep(settings, method, lambda _: next(figures), tmp_path / "best", World())
    for step in range(1, 5):
        best.after_step(torch.nn.Identity(), step, last=step == 4)
    assert best.report()["best_step"] == (3 if metric in {"loss", "perplexity"} else 2)


def test_a_classifier_stops_by_its_accuracy(encoder_trainings: Any) -> None:
    report, _, _ = encoder_trainings.run(
        "lora",
        {"rank": 4},
        rows=moods(),
        task={"type": "sequence-classification"},
        evaluation={"validation_fraction": 0.3},
        steps=24,
        early_stopping={"metric": "accuracy", "every_steps": 4, "patience": 2},
    )
    found = report.early_stopping
    values = [item["value"] for item in found["measured"]]
    assert found["best"] == max(values) > min(values)
    assert report.evaluation["after"]["accuracy"] == found["best"]


def test_a_metric_that_the_task_lacks_is_refused_before_anything_is_read(trainings: Any) -> None:
    with pytest.raises(RequestInvalid, match="causal-lm measures loss, perplexity, exact_match, not mcc") as refusal:
        trainings.run(rows=[], early_stopping={"metric": "mcc"})
    assert [item.pointer for item in refusal.value.errors] == ["/training/early_stopping/metric"]
