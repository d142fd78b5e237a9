"""Classifiers: new heads that are trained whole, under every method; labels, bad rows, and what is measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from tiny_base import moods, tagged

from artifacts.errors import FileBroken, RequestInvalid
from artifacts.intake import inspect
from train.base_files import BaseFiles
from train.catalog import METHODS
from train.continuation import Start
from train.evaluation import compare
from train.settings import EvaluationSettings
from train.tasks.class_scores import ClassScores
from train.tasks.classification import LABELS_KEY

TEXTS = {"type": "sequence-classification", "max_length": 64}
TOKENS = {"type": "token-classification", "max_length": 64}
SERVING = [name for name, row in METHODS.items() if TEXTS["type"] in row.capabilities.tasks]
SIZES: dict[str, dict[str, Any]] = {
    "adalora": {"initial_rank": 4, "target_rank": 2},
    "eva": {"rank": 2},
    "flexora": {"rank": 4, "validation_rows": 8, "target_modules": ["query", "value"]},
    "smora": {"rank": 4, "active_rank": 2},
    "increlora": {"target_rank": 4, "increment": 3, "layers_per_round": 7, "wait": 0},
    "vera": {"rank": 16},
}


def weights_of(adapter: Path) -> bytes:
    return (adapter / "adapter_model.safetensors").read_bytes()


def learn(trainings: Any, method: str, task: dict[str, Any], rows: list[dict[str, Any]], **more: Any) -> Any:
    parameters = SIZES.get(method, {"rank": 4})
    return trainings.run(method, parameters, task=task, rows=rows, steps=10, **more)


def check_head(trainings: Any, method: str, task: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """It learns, resumes to the same bytes, PEFT loads the head again, and intake takes it."""
    report, adapter, whole = learn(trainings, method, task, rows, checkpoint_steps=6)
    after, before = report.evaluation["after"], report.evaluation["before"]
    assert after["loss"] < before["loss"] - 0.05
    assert set(after) == {"loss", "accuracy", "macro_f1", "mcc"} == set(report.evaluation["difference"])
    assert report.reload["largest_difference"] <= 1e-4 < report.reload["effect"]
    again, resumed, _ = learn(trainings, method, task, rows, resume=whole.checkpoints[6])
    assert again.resumed_at == 6
    assert weights_of(resumed) == weights_of(adapter)
    assert (resumed / "adapter_config.json").read_bytes() == (adapter / "adapter_config.json").read_bytes()
    assert again.evaluation == report.evaluation
    manifest = inspect(adapter)
    assert not manifest.mergeable


def test_a_text_classifier_and_its_labels(encoder_trainings: Any) -> None:
    check_head(encoder_trainings, "lora", TEXTS, moods())
    adapter = encoder_trainings.folder / "run-1" / "adapter"
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()[LABELS_KEY]) == ["high", "low", "odd"]
        assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} <= set(file.keys())
    manifest = inspect(adapter)
    assert manifest.refusal is not None
    assert "classifier" in manifest.refusal
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier", "score"])


def test_a_token_classifier(encoder_trainings: Any) -> None:
    check_head(encoder_trainings, "adalora", TOKENS, tagged())


def test_a_causal_model_classifies_by_the_last_token(trainings: Any) -> None:
    report, adapter, _ = learn(trainings, "pissa", TEXTS, moods())
    assert report.evaluation["after"]["loss"] < report.evaluation["before"]["loss"] - 0.1
    assert report.reload["largest_difference"] <= 1e-4
    assert report.data["labels"] == ["high", "low", "odd"]
    assert "base_model.model.score.weight" in safe_open(adapter / "adapter_model.safetensors", "pt").keys()  # noqa: SIM118


@pytest.mark.slow
@pytest.mark.parametrize("method", SERVING)
def test_every_method_trains_a_head_of_texts(encoder_trainings: Any, method: str) -> None:
    check_head(encoder_trainings, method, TEXTS, moods())


@pytest.mark.slow
@pytest.mark.parametrize("method", SERVING)
def test_every_method_trains_a_head_of_tokens_on_a_causal_model(trainings: Any, method: str) -> None:
    sizes = SIZES.get(method, {"rank": 4})
    if method in ("eva", "flexora"):
        sizes = sizes | {"target_modules": ["q_proj", "v_proj"]}
    report, _, _ = trainings.run(method, sizes, task=TOKENS, rows=tagged(), steps=10)
    assert report.evaluation["after"]["loss"] < report.evaluation["before"]["loss"] - 0.05
    assert report.reload["largest_difference"] <= 1e-4


def test_a_head_stays_float32_on_a_bfloat16_base(encoder_trainings: Any) -> None:
    report, adapter, _ = learn(encoder_trainings, "lora", TEXTS, moods(), precision="bfloat16")
    assert report.evaluation["after"]["loss"] < report.evaluation["before"]["loss"]
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118


def test_accumulating_gives_the_gradient_of_the_large_batch(encoder_trainings: Any, tmp_path: Path) -> None:
    still = Path(shutil.copytree(encoder_trainings.base, tmp_path / "still"))
    config = json.loads((still / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (still / "config.json").write_text(json.dumps(config))
    encoder_trainings.base_files = BaseFiles("still", str(still))
    rows = [
        row | {"tokens": row["tokens"][: 1 + number % 4], "tags": row["tags"][: 1 + number % 4]}
        for number, row in enumerate(tagged(16))
    ]
    losses = []
    for size, parts in ((16, 1), (4, 4)):
        _, _, watcher = encoder_trainings.run(
            rows=rows,
            task=TOKENS,
            evaluation={"validation_fraction": 0},
            steps=2,
            batch_size=size,
            gradient_accumulation=parts,
            parameters={"rank": 4},
        )
        losses.append([watcher.points[step]["loss"] for step in (1, 2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        (TEXTS, {"text": "", "label": "low"}, "`text` is empty"),
        (TEXTS, {"text": 3, "label": "low"}, "`text` is no text"),
        (TEXTS, {"text": "a", "label": None}, "`label` is missing; a label is text or a whole number"),
        (TEXTS, {"text": "a", "label": 7}, "`label` has 7, but the first label is 'low'"),
        (TEXTS, {"text": "a" * 70, "label": "low"}, "70 tokens, 64 are allowed"),
        (TOKENS, {"tokens": [], "tags": []}, "`tokens` is empty"),
        (TOKENS, {"tokens": ["a"], "tags": ["O", "O"]}, "there are 1 tokens and 2 tags"),
        (TOKENS, {"tokens": ["a"], "tags": "O"}, "`tags` is no list"),
        (TOKENS, {"tokens": ["a", ""], "tags": ["O", "O"]}, "token 2, '', is nothing to the base's tokenizer"),
        (TOKENS, {"tokens": ["a" * 70], "tags": ["O"]}, "70 tokens, 64 are allowed"),
    ],
)
def test_a_bad_row_is_named(encoder_trainings: Any, task: dict[str, Any], row: dict[str, Any], words: str) -> None:
    good = moods(12) if task is TEXTS else tagged(12)
    with pytest.raises(FileBroken) as caught:
        encoder_trainings.run(task=task, rows=[*good, row])
    assert [finding.pointer for finding in caught.value.errors] == ["row 13"]
    assert words in caught.value.errors[0].message


def test_labels_that_teach_nothing_are_refused(encoder_trainings: Any) -> None:
    with pytest.raises(RequestInvalid, match="All training rows have the same label, 'low'"):
        encoder_trainings.run(task=TEXTS, rows=[row | {"label": "low"} for row in moods(12)])


def test_a_label_that_only_validation_rows_have_is_named(encoder_trainings: Any) -> None:
    from train.splits import split_of

    rows = moods(40)
    held_out = next(number for number, row in enumerate(rows) if split_of(row | {"label": "new"}, 0.2) == "validation")
    rows[held_out] = rows[held_out] | {"label": "new"}
    with pytest.raises(FileBroken, match=f"row {held_out + 1}: the label 'new' is in no training row"):
        encoder_trainings.run(task=TEXTS, rows=rows)


def test_a_pair_a_cut_row_and_numbers_as_labels(encoder_trainings: Any) -> None:
    rows = [
        {"text": "a" * 20, "text_pair": "b" * (50 if number == 3 else 4), "label": number % 2} for number in range(24)
    ]
    rows = [row | {"text": f"{number}" + row["text"]} for number, row in enumerate(rows)]
    report, _, _ = encoder_trainings.run(task=TEXTS | {"overlong": "truncate"}, rows=rows, steps=1)
    assert report.data["labels"] == [0, 1]
    assert report.data["cut_rows"] == {"count": 1, "first": [4]}
    assert report.data["longest_row"] == 64


def random_scores(generator: np.random.Generator, rows: int, classes: int, empty: int) -> ClassScores:
    """Items of up to four a row; the last class is never right."""
    row = np.repeat(np.arange(rows), generator.integers(1, 5, rows))
    truth = generator.integers(0, classes - 1, len(row))
    found = np.where(generator.random(len(row)) < 0.6, truth, generator.integers(0, classes - empty, len(row)))
    return ClassScores(rows, classes, row, truth, found, generator.random(len(row)))


@pytest.mark.parametrize("classes", [3, 7])
def test_figures_are_those_of_scikit_learn_also_of_a_resample(classes: int) -> None:
    generator = np.random.default_rng(classes)
    scores = random_scores(generator, 30, classes, 0)
    weights = np.vstack([np.ones(30), generator.multinomial(30, np.full(30, 1 / 30), size=4)])
    found = scores.figures(weights)
    for place, weight in enumerate(weights.astype(int)):
        drawn = np.repeat(np.arange(len(scores.row)), weight[scores.row])
        truth, guess = scores.truth[drawn], scores.found[drawn]
        assert found["accuracy"][place] == pytest.approx(accuracy_score(truth, guess))
        assert found["macro_f1"][place] == pytest.approx(f1_score(truth, guess, average="macro", zero_division=0))
        assert found["mcc"][place] == pytest.approx(matthews_corrcoef(truth, guess))
        assert found["loss"][place] == pytest.approx(scores.nll[drawn].mean())


def test_a_classifier_that_always_says_the_same_has_no_correlation() -> None:
    row = np.arange(6)
    scores = ClassScores(6, 2, row, row % 2, np.zeros(6, int), np.ones(6))
    assert scores.to_dict() == pytest.approx({"loss": 1.0, "accuracy": 0.5, "macro_f1": 1 / 3, "mcc": 0.0})
    assert ClassScores.of(json.loads(json.dumps(scores.to_lists()))).to_dict() == scores.to_dict()


def test_the_interval_of_a_classifier_covers_its_difference() -> None:
    generator = np.random.default_rng(1)
    before = random_scores(generator, 200, 4, 0)
    better = np.where(generator.random(len(before.truth)) < 0.5, before.truth, before.found)
    after = ClassScores(200, 4, before.row, before.truth, better, before.nll / 2)
    for name, found in compare(before, after, EvaluationSettings(), 1).items():
        assert found["low"] < found["difference"] < found["high"]
        assert (found["high"] < 0) if name == "loss" else (found["low"] > 0)


def test_a_classifier_goes_on_with_its_head_and_only_with_its_labels(encoder_trainings: Any) -> None:
    first, adapter, _ = learn(encoder_trainings, "lora", TEXTS, moods())
    start = Start("source", inspect(adapter), adapter)
    report, _, _ = encoder_trainings.run("lora", {}, task=TEXTS, rows=moods(), steps=1, start=start, learning_rate=1e-8)
    assert report.evaluation["before"]["loss"] == pytest.approx(first.evaluation["after"]["loss"], rel=1e-4)
    assert report.evaluation["after"]["loss"] == pytest.approx(first.evaluation["after"]["loss"], rel=1e-3)
    renamed = [row | {"label": row["label"].upper()} for row in moods()]
    with pytest.raises(RequestInvalid, match="its labels are"):
        encoder_trainings.run("lora", {}, task=TEXTS, rows=renamed, steps=1, start=start)
