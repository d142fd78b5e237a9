"""Flexora: the weights of the layers, their gradient, the two stages, and what comes out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor
from towers import Tower, drive, prepared, squared_error

from artifacts.errors import RequestInvalid
from train.adapted_layers import LowRankLinear, exchange
from train.batches import Batches
from train.catalog import METHODS, parse_parameters
from train.methods.flexora import METADATA, Flexora
from train.options.common import Circumstances, Target
from train.options.flexora import FlexoraOptions
from train.settings import TrainingSettings
from train.targets import check_method

WIDTH, ROWS = 6, 16


def rows(seed: int = 1, count: int = ROWS, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(count, width, generator=generator) for _ in range(2))
    return x, y


def filled(method: Flexora, seed: int = 2) -> Flexora:
    """With a B that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    for layer in method.layers.values():
        layer.lora_B.data.normal_(0, 0.3, generator=generator)  # type: ignore[union-attr, operator]
    return method


def weighted(method: Flexora, a: list[float]) -> Flexora:
    with torch.no_grad():
        method.learnt.a.copy_(torch.tensor(a))
    method._use_weights()
    return method


def test_at_the_start_the_output_is_that_of_the_base_bit_for_bit() -> None:
    x, y = rows()
    base, model = Tower(), Tower()
    method = prepared(model, x, y)
    assert method.learnt.weights.to(torch.float32).tolist() == [1.0] * 4
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("count", [2, 3, 7, 30, 49])
def test_the_weights_begin_at_exactly_one(count: int) -> None:
    x, y = rows()
    method = prepared(Tower(count), x, y)
    assert method._dial.weights is not None
    assert method._dial.weights.tolist() == [1.0] * count


def test_with_equal_weights_it_is_plain_lora() -> None:
    x, y = rows()
    model = Tower()
    method = filled(prepared(model, x, y, alpha=5.0))
    stock = get_peft_model(Tower(), LoraConfig(r=2, lora_alpha=5, target_modules=["proj"]))  # type: ignore[arg-type]
    for path, layer in method.layers.items():
        there = stock.base_model.model.get_submodule(path)
        there.lora_A["default"].weight.data.copy_(layer.lora_A)  # type: ignore[union-attr, arg-type, index]
        there.lora_B["default"].weight.data.copy_(layer.lora_B)  # type: ignore[union-attr, arg-type, index]
    with torch.no_grad():
        assert float((model(x) - stock(x)).abs().max()) <= 1e-6
        assert float((model(x) - Tower()(x)).abs().max()) > 0.1


def test_twice_the_weight_is_twice_the_delta_of_that_layer_and_of_no_other() -> None:
    """Not four times or eight, as where both factors, or the dropout too, are scaled."""
    x, y = rows()
    method = filled(prepared(Tower(), x, y, dropout=0.3))
    deltas = []
    for second in (1.0, 2.0):
        method._dial.weights = torch.tensor([1.0, second, 1.0, 1.0])
        for layer in method.layers.values():
            layer.eval()
        deltas.append([layer.delta() for layer in method.layers.values()])
    ratios = [float(after.norm() / before.norm()) for before, after in zip(*deltas, strict=True)]
    assert ratios == pytest.approx([1.0, 2.0, 1.0, 1.0], abs=1e-6)


def test_a_plain_lora_with_the_weight_in_b_is_the_first_stage() -> None:
    x, y = rows()
    model = Tower()
    method = weighted(filled(prepared(model, x, y)), [1.0, -0.5, 0.3, 0.0])
    expected = model(x).detach()
    plain = Tower()
    for path in method.layers:
        exchange(plain, path, LowRankLinear(plain.get_submodule(path), method.folded(path)))
    assert float((plain(x).detach() - expected).abs().max()) <= 1e-5
    assert method.folded("layers.0.proj").rank == 2


@pytest.mark.parametrize("ud_steps", [0, 2])
def test_a_step_of_the_weights_leaves_the_adapter_its_gradients_and_the_modes_alone(ud_steps: int) -> None:
    x, y = rows()
    model = Tower()
    method = filled(prepared(model, x, y, ud_steps=ud_steps, ud_rate=0.3 if ud_steps else None, dropout=0.2))
    model.train()
    model.head.eval()
    squared_error(model, {"x": x, "y": y}).backward()
    trained = [value for value in model.parameters() if value.requires_grad]
    assert len(trained) == 8
    values = [value.detach().clone() for value in trained]
    gradients = [value.grad.clone() for value in trained if value.grad is not None]
    before = method.learnt.a.detach().clone()
    random = torch.get_rng_state()
    method.after_update(model, 0)
    assert not torch.equal(method.learnt.a, before)
    assert [value for value in model.parameters() if value.requires_grad] == trained
    for value, kept, gradient in zip(trained, values, gradients, strict=True):
        assert torch.equal(value, kept)
        assert value.grad is not None
        assert torch.equal(value.grad, gradient)
    assert model.training
    assert not model.head.training
    assert torch.equal(torch.get_rng_state(), random), "evaluation mode: no dropout mask was drawn"


def test_a_step_of_the_adapter_leaves_the_weights_alone() -> None:
    x, y = rows()
    model = Tower()
    method = filled(prepared(model, x, y))
    before = method.learnt.a.detach().clone()
    method.before_step(model, 0)
    squared_error(model, {"x": x, "y": y}).backward()
    method.before_update(model, 0)
    assert method.learnt.a.grad is None
    assert torch.equal(method.learnt.a, before)


def test_the_gradient_is_the_mean_over_the_held_out_batches() -> None:
    x, y = rows()
    model = Tower()
    method = filled(prepared(model, x, y, validation_rows=8, validation_batches=3, validation_batch_size=2))
    found = method.weight_gradient(model, 0)
    w = torch.ones(4, requires_grad=True)
    held = method.held.take(0, 6)
    assert len(set(held)) == 6
    losses = [method._loss(model, held[at : at + 2])(method._factors(), w) for at in (0, 2, 4)]
    mean = torch.stack(losses).mean()
    (expected,) = torch.autograd.grad(mean, w)
    torch.testing.assert_close(found.weights, expected)
    assert found.loss == pytest.approx(float(mean.detach()))


@pytest.mark.parametrize("ud_steps", [1, 3])
def test_the_unrolled_gradient_of_the_method_is_that_of_the_steps_that_it_unrolls(ud_steps: int) -> None:
    """Against central differences of: plain descent on training rows, then the loss on held-out rows."""
    x, y = rows()
    model = Tower()
    method = filled(prepared(model, x, y, ud_steps=ud_steps, ud_rate=0.1))
    found = method.weight_gradient(model, 4).weights
    train = [method.kept.take((4 * ud_steps + number) * 4, 4) for number in range(ud_steps)]
    held = [method.held.take(4 * 2 + number, 1) for number in range(2)]

    def value(w: Tensor) -> float:
        theta = [factor.detach().clone().requires_grad_() for factor in method._factors()]
        for numbers in train:
            steps = torch.autograd.grad(method._loss(model, numbers)(theta, w), theta)
            theta = [(at - 0.1 * gradient).detach().requires_grad_() for at, gradient in zip(theta, steps, strict=True)]
        with torch.no_grad():
            return sum(float(method._loss(model, numbers)(theta, w)) for numbers in held) / len(held)

    numeric = []
    for number in range(4):
        apart = torch.zeros(4)
        apart[number] = 1e-2
        numeric.append((value(1 + apart) - value(1 - apart)) / 2e-2)
    torch.testing.assert_close(found, torch.tensor(numeric), rtol=5e-3, atol=2e-4)
    direct = filled(prepared(other := Tower(), x, y)).weight_gradient(other, 4).weights
    assert float((found - direct).abs().max()) > 1e-3


def test_the_second_stage_begins_anew_in_the_chosen_layers_alone() -> None:
    x, y = rows()
    model = Tower()
    method = prepared(model, x, y, steps=8, selection_steps=3, selection="top_k", top_k=2, whole=["head"])
    head = [value.detach().clone() for value in model.head.parameters()]
    starts = {path: layer.lora_A.detach().clone() for path, layer in method.layers.items()}  # type: ignore[union-attr, operator]
    seen: list[dict[str, float]] = []

    def watch(step: int) -> None:
        seen.append(dict(method.metrics()))
        if step == 2:
            assert not torch.equal(model.head.weight, head[0])

    drive(method, model, 3, watch=watch)
    weights = method.learnt.weights.tolist()
    assert sum(weights) == pytest.approx(4)
    assert len(set(weights)) == 4
    method.before_step(model, 3)
    assert method.choice is not None
    assert set(method.choice.layers) == set(sorted(range(4), key=lambda layer: -weights[layer])[:2])
    assert all(torch.equal(value, kept) for value, kept in zip(model.head.parameters(), head, strict=True))
    assert torch.equal(model(x), Tower()(x)), "B is 0 again"
    trained = [value for value in model.parameters() if value.requires_grad]
    assert sum(value.numel() for value in trained) == method.trained_parameters(model) == 2 * 2 * 12 + 42
    assert not method._optimizer.state  # type: ignore[union-attr]
    for path, layer in method.layers.items():
        assert not torch.equal(layer.lora_A, starts[path])  # type: ignore[arg-type]
    loss = squared_error(model, {"x": x, "y": y})
    loss.backward()
    reached = {path for path, layer in method.layers.items() if layer.lora_B.grad is not None}  # type: ignore[union-attr]
    assert reached == {f"layers.{number}.proj" for number in method.choice.layers}
    method.after_update(model, 3)
    assert method.metrics() == {"stage": 2.0, "chosen_layers": 2.0}
    assert {entry["stage"] for entry in seen} == {1.0}
    assert seen[0].keys() == {"stage", "selection_loss", "largest_weight", "weight_entropy"}


def test_each_stage_has_the_whole_schedule_and_the_second_one_the_warm_up() -> None:
    x, y = rows()
    model = Tower()
    settings = {"learning_rate": 0.1, "schedule": "linear", "warmup_steps": 2}
    method = prepared(model, x, y, steps=10, selection_steps=4, settings=settings)
    rates: list[float] = []
    drive(method, model, 10, watch=lambda step: rates.append(method._optimizer.param_groups[0]["lr"]))  # type: ignore[union-attr]
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025, 0.0, 0.05, 0.1, 0.075, 0.05, 0.025])


def test_the_loop_leaves_the_held_out_rows_to_the_second_stage(trainings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """51 rows are 7 batches an epoch, two of them a step, but one in every fourth."""
    seen: list[tuple[int, list[list[int]]]] = []
    held: set[int] = set()
    order, take = Batches.__iter__, Flexora.withheld

    def watched(self: Batches) -> Any:
        seen.append((self.epoch, batches := []))
        for batch in order(self):
            batches.append(batch)
            yield batch

    def told(self: Flexora) -> Any:
        held.update(take(self).rows)
        return take(self)

    monkeypatch.setattr(Batches, "__iter__", watched)
    monkeypatch.setattr(Flexora, "withheld", told)
    trainings.run("flexora", SELECTING | {"selection_steps": 6}, steps=8)
    assert len(held) == 8
    (first, before), (second, after) = seen
    assert (first, second) == (0, 1)
    batches = [set(batch) for batch in before + after]
    assert [len(before), len(after)] == [7, 7]
    for number, batch in enumerate(batches):
        assert (not held & batch) or number >= 7 + 4, number
    assert held & set().union(*batches[11:])


SELECTING = {"rank": 4, "dropout": 0.1, "selection_steps": 5, "validation_rows": 8, "validation_batches": 4}


@pytest.mark.parametrize("more", [{"selection": "above_mean"}, {"selection": "top_k", "top_k": 1, "ud_steps": 1}])
def test_a_training_goes_on_from_the_middle_of_the_first_stage_and_from_its_end(
    trainings: Any, more: dict[str, Any]
) -> None:
    report, adapter, whole = trainings.run("flexora", SELECTING | more, steps=9, checkpoint_steps=1)
    for step in (2, 5):
        again, resumed, watcher = trainings.run("flexora", SELECTING | more, steps=9, resume=whole.checkpoints[step])
        assert _digests(resumed) == _digests(adapter)
        assert watcher.points == {at: values for at, values in whole.points.items() if at > step}
        assert again.own == report.own
    stages = [values["stage"] for _, values in sorted(whole.points.items())]
    assert stages == [1.0] * 5 + [2.0] * 4


def test_what_comes_out_is_a_plain_lora_of_the_chosen_layers_that_says_how_they_were_chosen(trainings: Any) -> None:
    report, adapter, _ = trainings.run("flexora", SELECTING | {"selection": "above_mean"}, steps=8)
    own = report.own
    chosen = [entry["layer"] for entry in own["layers"] if entry["chosen"]]
    assert [entry["layer"] for entry in own["layers"]] == ["model.layers.0", "model.layers.1"]
    assert own["chosen_layers"] == len(chosen) == 1
    assert own["rule"] == "above_mean"
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        keys, told = list(file.keys()), json.loads(file.metadata()[METADATA])
        numbers = sum(file.get_tensor(key).numel() for key in keys)
    assert len(keys) == 14
    assert all(key.startswith(f"base_model.model.{chosen[0]}.") for key in keys)
    assert report.trainable_parameters == numbers == 4 * (4 * 64 - 2 * 16 + 3 * 80)
    assert told["weights"] == [entry["weight"] for entry in own["layers"]]
    assert [told["layers"][number] for number in told["chosen"]] == chosen
    (picture,) = own["pictures"]
    assert picture["columns"] == ["1", "2", "3", "4", "5"]
    assert [row[-1] for row in picture["values"]] == told["weights"]
    assert sum("✓" in name for name in picture["rows"]) == 1
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 7


def test_the_count_of_parameters_is_that_of_the_authors() -> None:
    """Llama-3-8B, q_proj and v_proj, rank 8: 3,407,872 in all 32 layers, half of them for HellaSwag's 16."""
    options = parse_parameters("flexora", {"rank": 8})
    layer = options.parameters_of(4096, 4096) + options.parameters_of(1024, 4096)
    assert (layer, 32 * layer, 16 * layer) == (106_496, 3_407_872, 1_703_936)


def targets_of(*paths: str) -> list[Target]:
    return [Target(path, 16, 16) for path in paths]


TWO = targets_of("model.layers.0.q", "model.layers.1.q")


@pytest.mark.parametrize(
    ("parameters", "training", "targets", "pointer", "told"),
    [
        ({}, {}, targets_of("layers.0.q", "layers.1.q", "pooler.dense"), "/parameters/target_modules", "pooler.dense"),
        ({}, {}, targets_of("layers.3.q", "layers.3.v"), "/parameters/target_modules", "layers.3: one layer"),
        ({"selection": "top_k", "top_k": 3}, {}, TWO, "/parameters/top_k", "more than the 2 layers"),
        ({"selection": "top_k"}, {}, TWO, "/parameters/top_k", "goes with selection=top_k"),
        ({"top_k": 1}, {}, TWO, "/parameters/top_k", "goes with selection=top_k"),
        ({"selection_steps": 20}, {}, TWO, "/parameters/selection_steps", "leaves none of the 20"),
        ({"validation_rows": 50}, {}, TWO, "/parameters/validation_rows", "50 rows can not be held out of 50"),
        ({"ud_rate": 0.1}, {}, TWO, "/parameters/ud_rate", "ud_steps is 0"),
        ({"ud_steps": 1}, {"gradient_checkpointing": True}, TWO, "/parameters/ud_steps", "gradient_checkpointing"),
        ({"ud_steps": 1}, {"precision": "float16"}, TWO, "/parameters/ud_steps", "float16"),
        ({}, {"early_stopping": {}}, TWO, "/training/early_stopping", "thrown away"),
    ],
)
def test_what_can_not_be_done_is_refused_where_it_stands(
    parameters: dict[str, Any], training: dict[str, Any], targets: list[Target], pointer: str, told: str
) -> None:
    options = parse_parameters("flexora", {"validation_rows": 10} | parameters)
    known = Circumstances(targets, TrainingSettings(steps=20, **training), steps=20, rows=50)
    with pytest.raises(RequestInvalid) as caught:
        check_method(options, known)
    assert [finding.pointer for finding in caught.value.errors] == [pointer]
    assert told in caught.value.errors[0].message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ud_steps", -1),
        ("weight_rate", 0),
        ("validation_batches", 0),
        ("validation_rows", 0),
        ("rank", 0),
        ("alpha", 0),
        ("dropout", 1),
        ("top_k", 0),
        ("selection", "best"),
    ],
)
def test_a_parameter_out_of_its_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestInvalid) as caught:
        parse_parameters("flexora", {name: value})
    assert caught.value.errors[0].pointer == f"/parameters/{name}"


def test_the_default_first_stage_is_a_quarter_and_never_longer_than_the_authors() -> None:
    options = FlexoraOptions()
    assert [options.steps_of_selection(steps) for steps in (2, 100, 100_000)] == [1, 25, 600]
    many = FlexoraOptions(validation_rows=3)
    assert "8 rows, of which 3" in many.warnings(Circumstances(TWO, TrainingSettings()))[0]
    assert METHODS["flexora"].capabilities.exports == "lora"


def _digests(adapter: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(adapter.iterdir())}
