"""Bone as it is handed over: what each variant exports, loads again and resumes to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bone_nets import D_IN, D_OUT, TOLERANCE, VARIANTS, Net, R, delta_of, draw, filled
from peft import MissConfig, PeftModel
from torch import Tensor, nn

from artifacts.adapter import Adapter
from artifacts.errors import BaseMismatch, FileBroken, FormatUnknown, ReloadMismatch
from artifacts.intake import inspect
from artifacts.shard_blocks import lora_factors
from train import declared
from train.catalog import METHODS, parse_parameters
from train.protocol import MethodContext
from train.settings import TrainingSettings

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")


@pytest.mark.parametrize(("rank", "mini_r", "kept"), [(8, 4, 4), (4, 8, 4), (8, 24, 8)])
def test_mini_is_exported_at_the_smaller_of_its_ranks(tmp_path: Path, rank: int, mini_r: int, kept: int) -> None:
    method, model, _ = filled("mini", rank=rank, mini_r=mini_r)
    method.export(model, tmp_path)
    factors = Adapter.open(tmp_path)["linear"]
    assert (factors.rank, factors.scaling) == (kept, 1.0)
    torch.testing.assert_close(factors.B @ factors.A, delta_of(model), atol=TOLERANCE, rtol=0)
    loaded = PeftModel.from_pretrained(Net(), str(tmp_path))
    torch.testing.assert_close(loaded(draw(7, D_IN)), model(draw(7, D_IN)), atol=TOLERANCE, rtol=0)
    assert method.report(model)["export"]["rank"] == kept


def test_a_rank_above_the_outputs_is_exported_at_their_number(tmp_path: Path) -> None:
    method, model, _ = filled("default", rank=30)
    method.export(model, tmp_path)
    factors = Adapter.open(tmp_path)["linear"]
    assert factors.rank == D_OUT
    torch.testing.assert_close(factors.B @ factors.A, delta_of(model), atol=TOLERANCE, rtol=0)


def test_bat_col_is_exported_as_what_peft_calls_bat(tmp_path: Path) -> None:
    method, model, _ = filled("bat_col")
    method.export(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["init_weights"]) == ("MISS", "bat")
    loaded = PeftModel.from_pretrained(Net(), str(tmp_path))
    torch.testing.assert_close(loaded(draw(7, D_IN)), model(draw(7, D_IN)), atol=TOLERANCE, rtol=0)


def test_bat_row_is_a_declared_type_that_its_loader_alone_takes(tmp_path: Path) -> None:
    method, model, _ = filled("bat_row")
    method.export(model, tmp_path)
    x = draw(7, D_IN)
    torch.testing.assert_close(method.reload(Net(), tmp_path)(x), model(x), atol=0, rtol=0)
    with pytest.raises(KeyError, match="RANKWISE_BAT_ROW"):
        PeftModel.from_pretrained(Net(), str(tmp_path))
    manifest = inspect(tmp_path)
    assert (manifest.method, manifest.mergeable, manifest.rank) == ("bat_row", False, R)
    assert "depends on the base weights" in str(manifest.refusal)


def test_a_declared_adapter_is_refused_by_other_weights_and_when_it_is_broken(tmp_path: Path) -> None:
    method, model, _ = filled("bat_row")
    method.export(model, tmp_path)
    other = Net()
    with torch.no_grad():
        other.linear.weight.mul_(1.01)
    with pytest.raises(BaseMismatch, match="not those that the adapter was trained on"):
        declared.load(other, tmp_path)
    with pytest.raises(BaseMismatch, match="no such layer"):
        declared.load(nn.Sequential(nn.Linear(D_IN, D_OUT)), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"r": 4}))
    with pytest.raises(FileBroken, match=r"linear\.block"):
        declared.load(Net(), tmp_path)
    path.write_text(json.dumps(config | {"r": 5}))
    with pytest.raises(BaseMismatch, match="blocks of side 5"):
        declared.load(Net(), tmp_path)
    path.write_text(json.dumps(config | {"peft_type": "LORA"}))
    with pytest.raises(FormatUnknown, match="'LORA' is no type of Rankwise's own"):
        declared.load(Net(), tmp_path)


@pytest.mark.parametrize("variant", ["bat_col", "bat_row"])
def test_what_a_lossy_export_loses_is_measured_and_never_called_exact(tmp_path: Path, variant: str) -> None:
    options = parse_parameters("bone", {"variant": variant, "rank": R, "lossy_rank": 6})
    method = METHODS["bone"].load(options)
    context = MethodContext(["linear"], 10, lambda: iter(()), TrainingSettings(), task_type=None)
    model = method.prepare(Net(), context)
    [block] = [value for value in model.parameters() if value.requires_grad]
    block.data.copy_(0.3 * draw(*block.shape, seed=5))
    exact = delta_of(model)
    method.settle(model)
    export = method.report(model)["export"]
    values = torch.linalg.svdvals(exact)
    expected = float(values[6:].norm() / values.norm())
    assert (export["form"], export["exact"], export["rank"]) == ("lora", False, 6)
    assert export["relative_error"] == pytest.approx(expected, rel=1e-4)
    assert 0.05 < expected < 0.9
    method.export(model, tmp_path)
    factors = Adapter.open(tmp_path)["linear"]
    assert float((factors.B @ factors.A - exact).norm() / exact.norm()) == pytest.approx(expected, rel=1e-4)
    x = draw(7, D_IN)
    torch.testing.assert_close(method.reload(Net(), tmp_path)(x), model(x), atol=TOLERANCE, rtol=0)


FORMS = {"default": "lora", "mini": "lora", "bat_col": "miss", "bat_row": "bat_row"}


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_every_variant_learns_resumes_to_the_bit_and_says_what_it_is(trainings: Any, variant: str) -> None:
    parameters = {"variant": variant, "rank": 8, **({"mini_r": 4} if variant == "mini" else {})}
    report, adapter, whole = trainings.run("bone", parameters, steps=6, checkpoint_steps=4)
    assert report.evaluation["after"]["loss"] < report.evaluation["before"]["loss"] - 0.1
    assert report.reload["largest_difference"] <= 1e-4 < report.reload["effect"]
    again, resumed, _ = trainings.run("bone", parameters, steps=6, resume=whole.checkpoints[4])
    assert again.resumed_at == 4
    files = [
        [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(of.iterdir())] for of in (adapter, resumed)
    ]
    assert files[0] == files[1]
    sides = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32, "gate_proj": 48, "up_proj": 48, "down_proj": 32}
    per_layer = {"mini": 7 * 8 * 4, "bat_col": 8 * sum(sides.values()), "bat_row": 8 * (6 * 32 + 48)}[variant]
    assert report.trainable_parameters == report.estimate["trainable_parameters"] == 2 * per_layer
    row = METHODS["bone"].capabilities
    expected = row.variants.get(variant, row)
    manifest = inspect(adapter)
    assert (manifest.method, manifest.mergeable) == (expected.exports, expected.mergeable)
    assert (report.own["variant"], report.own["export"]["form"]) == (variant, FORMS[variant])


def test_a_lossy_export_is_checked_and_measured_as_what_it_is(trainings: Any) -> None:
    parameters = {"variant": "bat_row", "rank": 8, "lossy_rank": 2}
    report, adapter, _ = trainings.run("bone", parameters, steps=2)
    assert report.own["export"]["exact"] is False
    assert report.own["export"]["relative_error"] > 0.1
    assert any("not what was trained" in text for text in report.warnings)
    assert report.reload["largest_difference"] <= 1e-4
    assert report.trainable_parameters == 2 * 8 * (6 * 32 + 48)
    assert {factors.rank for factors in Adapter.open(adapter).values()} == {2}


def test_a_declared_adapter_that_is_not_the_trained_model_is_found_out(trainings: Any, monkeypatch: Any) -> None:
    fill = declared.fill

    def spoilt(places: Any, directory: Any) -> None:
        fill(places, directory)
        for place in places.values():
            place.mul_(1.01)

    monkeypatch.setattr(declared, "fill", spoilt)
    with pytest.raises(ReloadMismatch, match="logits that differ by"):
        trainings.run("bone", {"variant": "bat_row", "rank": 8}, steps=2)


def test_modules_that_are_trained_whole_are_in_every_export(tmp_path: Path) -> None:
    class Classifier(Net):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(D_OUT, 2)
            nn.init.ones_(self.score.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.score(self.linear(x))

    for variant in VARIANTS:
        method = METHODS["bone"].load(parse_parameters("bone", {"variant": variant, "rank": R, "mini_r": 4}))
        context = MethodContext(["linear"], 10, lambda: iter(()), TrainingSettings(), task_type=None, whole=["score"])
        model = method.prepare(Classifier(), context)
        for value in model.parameters():
            if value.requires_grad:
                value.data += 0.1 * draw(*value.shape)
        method.export(model, tmp_path / variant)
        loaded = method.reload(Classifier().eval(), tmp_path / variant)
        torch.testing.assert_close(loaded(draw(5, D_IN)), model(draw(5, D_IN)), atol=1e-4, rtol=0)


def test_peft_converts_the_tile_forms_to_the_same_factors() -> None:
    """PEFT's own conversion is another way to the same ΔW."""
    from peft import convert_to_lora

    for variant in ("default", "mini"):
        _, model, block = filled(variant)
        assert isinstance(model.peft_config["default"], MissConfig)  # type: ignore[index]
        _, state = convert_to_lora(model, rank=2)
        A, B = lora_factors(block.detach(), D_OUT, D_IN)
        found = {name.split(".")[-2]: value for name, value in state.items()}
        torch.testing.assert_close(found["lora_B"] @ found["lora_A"], B @ A, atol=1e-4, rtol=0)
