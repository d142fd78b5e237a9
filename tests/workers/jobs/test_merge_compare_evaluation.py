"""A comparison of merges that measures every candidate on data: the ranking is by what they do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from artifacts.base_model import inspect_base
from artifacts.errors import RequestInvalid
from train.base_files import BaseFiles
from train.data import DataFile
from train.measurement import Measurement
from train.measurement_settings import MeasurementSettings
from train.quiet import peft_deprecations_ignored
from workers.kinds import KINDS

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
ROWS = [{"prompt": f"{a} plus {b} is ", "completion": str(a + b)} for a in range(3) for b in range(4)]
SECONDS = 200


@pytest.fixture
def data(tmp_path: Path) -> Path:
    from tiny_base import write_rows

    return write_rows(tmp_path / "rows.jsonl", ROWS)


def measurement(tiny_base: Path, data: Path, folder: Path, **settings: Any) -> Measurement:
    files = BaseFiles("tiny", str(tiny_base))
    wanted = MeasurementSettings(**settings)
    return Measurement(files, [DataFile(data, "jsonl")], wanted, "cpu", folder, lambda _done, _all: None)


def test_the_figures_are_those_of_base_and_adapter_and_the_base_stays_itself(
    tiny_base: Path, data: Path, write_adapter: Any, tmp_path: Path
) -> None:
    from peft import PeftModel

    sides = {"d_in": 32, "d_out": 32, "modules": MODULES}
    small = write_adapter(tmp_path / "a", 1, **sides)
    other = write_adapter(tmp_path / "b", 2, **sides)
    measured = measurement(tiny_base, data, tmp_path / "work", max_rows=5)
    assert measured.rows == [5]
    first = measured.of(small)
    changed = measured.of(other)
    assert first["figures"] != changed["figures"]
    assert measured.of(small) == first  # nothing of the other one is left
    # the loss, computed here from the logits
    with peft_deprecations_ignored():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), small).eval()
    task = measured._task
    losses, tokens = 0.0, 0
    for example in measured._rows[0]:
        batch = task.collate([example])
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = model(**batch).logits[0, :-1]
        counted = labels != -100
        losses += float(torch.nn.functional.cross_entropy(logits[counted], labels[counted], reduction="sum"))
        tokens += int(counted.sum())
    assert first["figures"]["loss"] == pytest.approx(losses / tokens, rel=1e-5)
    assert first["figures"]["perplexity"] == pytest.approx(math.exp(losses / tokens), rel=1e-4)
    difference = first["difference"]["loss"]
    assert difference["difference"] == pytest.approx(first["figures"]["loss"] - measured.base["loss"])
    assert difference["low"] <= difference["difference"] <= difference["high"]
    assert measured.order({"loss": 2.0}) == 2.0


def test_an_adapter_of_our_own_type_is_measured_and_taken_off_again(
    tiny_base: Path, data: Path, write_adapter: Any, tmp_path: Path
) -> None:
    from train import declared
    from train.methods.smora import TYPE
    from train.smora_layer import Shape, SmoraLinear

    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    layers = {path: SmoraLinear(base.get_submodule(path), Shape(4, 2, 4.0)) for path in MODULES}
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(0))
    config = {"r": 4, "active_rank": 2, "lora_alpha": 4.0, "rank_partition": 1, "bias_in_gate": False}
    declared.write(tmp_path / "smora", TYPE, layers, {}, config)
    plain = write_adapter(tmp_path / "plain", 1, d_in=32, d_out=32, modules=MODULES)
    measured = measurement(tiny_base, data, tmp_path / "work", max_rows=5)
    before = measured.of(plain)
    found = measured.of(tmp_path / "smora")
    assert measured.of(plain) == before
    model = declared.load(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path / "smora").eval()
    task = measured._task
    scores = task.score(model, measured._rows[0], measured._settings.evaluation(), lambda _: None)
    assert found["figures"] == scores.to_dict()
    assert abs(found["difference"]["loss"]["difference"]) > 1e-3


def test_exact_match_is_the_better_the_higher(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    measured = measurement(tiny_base, data, tmp_path / "work", max_rows=2, metric="exact_match", max_new_tokens=2)
    assert 0 <= measured.base["exact_match"] <= 1
    assert measured.order({"exact_match": 0.75}) == -0.75


def test_packs_are_refused() -> None:
    with pytest.raises(ValueError, match="packing"):
        MeasurementSettings.model_validate({"task": {"type": "causal-lm", "packing": True}})


def test_a_merge_without_finite_figures_is_told_and_not_ranked(
    tiny_base: Path,
    run_here: Any,
    add_adapter: Any,
    add_dataset: Any,
    base_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sides = {"d_in": 32, "d_out": 32, "modules": MODULES, "base_model": inspect_base(tiny_base).name}
    wanted = {
        "adapters": [{"id": add_adapter("a", 1, **sides)}],
        "candidates": [{"method": "cat"}, {"method": "svd", "parameters": {"rank": 1}, "label": "thin"}],
        "evaluation": {"dataset": add_dataset(ROWS), "base_model": base_id, "metric": "loss", "max_rows": 2},
        "publish": "all",
    }
    of, infinite = Measurement.of, {"0"}

    def some_infinite(self: Measurement, directory: Path) -> dict[str, Any]:
        found = of(self, directory)
        return found | {"figures": found["figures"] | {"loss": -math.inf}} if directory.name in infinite else found

    monkeypatch.setattr(Measurement, "of", some_infinite)
    result = run_here("merge_compare", model_roots=(str(tiny_base.parent),), **wanted)
    first, second = result["report"]["candidates"]
    assert result["report"]["ranking"] == ["thin"]
    assert "figures.loss is -inf" in first["problem"]
    assert (first["adapter"], second["adapter"], len(result["adapters"])) == (None, 0, 1)
    assert "figures" in second
    infinite.add("1")
    with pytest.raises(RequestInvalid, match="None of the 2 merges could be measured"):
        run_here("merge_compare", model_roots=(str(tiny_base.parent),), **wanted)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_ranking_is_by_the_metric_and_the_best_is_published(
    train_pool: Any, add_adapter: Any, add_dataset: Any, base_id: str, tiny_base: Path
) -> None:
    pool = train_pool
    sides = {"d_in": 32, "d_out": 32, "modules": MODULES, "base_model": inspect_base(tiny_base).name}
    ids = [add_adapter("a", 1, **sides), add_adapter("b", 2, **sides)]
    job_id = pool.submit(
        "merge_compare",
        adapters=[{"id": key, "weight": 0.1} for key in ids],
        candidates=[{"method": "cat"}, {"method": "svd", "parameters": {"rank": 1}, "label": "thin"}],
        evaluation={"dataset": add_dataset(ROWS), "base_model": base_id, "metric": "loss", "max_rows": 6},
        publish="best",
        name="won",
    )
    pool.start(kinds=KINDS, model_roots=(str(tiny_base.parent),))
    job = pool.ended(job_id, seconds=SECONDS)
    assert job.error is None
    report = job.result["report"]
    figures = {row["label"]: row["figures"]["loss"] for row in report["candidates"]}
    assert report["ranking"] == sorted(figures, key=lambda label: figures[label])
    assert report["ranked_by"] == "loss"
    assert report["evaluation"]["rows"] == 6
    assert report["evaluation"]["base"]["loss"] > 0
    published = {row["label"]: row["adapter"] for row in report["candidates"]}
    assert published == {label: 0 if label == report["ranking"][0] else None for label in figures}
    assert len(job.result["adapters"]) == 1
