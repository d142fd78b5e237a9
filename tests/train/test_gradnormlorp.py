"""GradNormLoRP: the exact properties of the layers, of the projected optimiser and of the export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_nets import Net, in_batches, prepare, regression_rows
from test_methods import digests
from torch import Tensor, nn
from torch.nn import functional

from artifacts.errors import RequestInvalid, TrainingDiverged
from train.normalized_layers import LowRankNormalizedLinear, NormalizedLinear, WholeNormalizedLinear
from train.projected_adamw import ProjectedAdamW
from train.projection import Projection
from train.quiet import peft_deprecations_ignored

ROWS = regression_rows()
R, T = 4, 5


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def base(bias: bool = True) -> nn.Linear:
    made = nn.Linear(24, 20, bias=bias, dtype=torch.float64)
    made.weight.data.copy_(drawn(20, 24, seed=1))
    if bias:
        made.bias.data.copy_(drawn(20, seed=2))
    return made


def low_rank(exact: bool, trained: bool = True, dropout: float = 0.0) -> LowRankNormalizedLinear:
    """r = 8, scaling 0.5; `trained` moves B and m away from their start."""
    torch.manual_seed(0)
    layer = LowRankNormalizedLinear(base(), 8, 0.5, dropout, exact=exact)
    if trained:
        layer.lora_B.data.copy_(drawn(20, 8, seed=3))
        layer.magnitude.data.mul_(1 + 0.3 * torch.rand(20, generator=torch.Generator().manual_seed(4)).double())
    return layer


def whole() -> WholeNormalizedLinear:
    layer = WholeNormalizedLinear(base())
    layer.change.data.copy_(drawn(20, 24, seed=5))
    return layer


def direction(layer: NormalizedLinear) -> Tensor:
    """V."""
    if isinstance(layer, LowRankNormalizedLinear):
        return layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    assert isinstance(layer, WholeNormalizedLinear)
    return layer.weight + layer.change


def effective(layer: NormalizedLinear) -> Tensor:
    V = direction(layer)
    return layer.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)


# The layers.


def test_it_starts_at_the_base_with_an_a_that_is_not_0() -> None:
    layer, x = low_rank(exact=False, trained=False), drawn(7, 24, seed=9)
    torch.testing.assert_close(layer(x), layer.base(x), rtol=0, atol=1e-12)
    assert float(layer.lora_A.detach().abs().min()) > 0
    assert float(layer.adapter(x).detach().abs().max()) < 1e-12


@pytest.mark.parametrize("make", [lambda: low_rank(False), lambda: low_rank(True), whole], ids=["detach", "exact", "V"])
def test_the_layer_is_the_formula_and_its_rows_have_the_norms_m(make: Any) -> None:
    layer, x = make(), drawn(7, 24, seed=9)
    torch.testing.assert_close(layer(x), functional.linear(x, effective(layer), layer.base.bias), rtol=0, atol=1e-10)
    weight = layer(torch.eye(24).double()).T - layer.base.bias[:, None]
    torch.testing.assert_close(weight.norm(dim=1), layer.magnitude.detach(), rtol=1e-12, atol=0)
    change = layer.adapter(torch.eye(24).double()).T
    torch.testing.assert_close(change, weight - layer.weight, rtol=0, atol=1e-10)


def gradient_of_v(layer: NormalizedLinear) -> tuple[Tensor, Tensor]:
    """∂L/∂V and V of the loss ⟨G, W_eff⟩ with a fixed G, read off ∂L/∂B = s·(∂L/∂V)·Aᵀ with an A of full rank."""
    assert isinstance(layer, LowRankNormalizedLinear)
    V = direction(layer).detach()
    layer.lora_A = nn.Parameter(torch.eye(24).double())
    layer.lora_B = nn.Parameter((V - layer.weight) / layer.scaling)
    (layer(torch.eye(24).double()).T * drawn(20, 24, seed=11)).sum().backward()
    assert layer.lora_B.grad is not None
    return layer.lora_B.grad / layer.scaling, V


def test_the_exact_gradient_is_orthogonal_to_the_rows_and_the_detached_one_is_not() -> None:
    found = {exact: gradient_of_v(low_rank(exact)) for exact in (True, False)}
    radial = {exact: (gradient * V).sum(1).abs() for exact, (gradient, V) in found.items()}
    assert float(radial[True].max()) < 1e-12
    assert float(radial[False].min()) > 1e-4
    # What the two differ by is radial: (m/n)·(G − g·v̂) against (m/n)·G.
    layer, G = low_rank(True), drawn(20, 24, seed=11)
    V = direction(layer).detach()
    n = V.norm(dim=1, keepdim=True)
    v = V / n
    factor = layer.magnitude.detach()[:, None] / n
    torch.testing.assert_close(found[False][0], factor * G, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[True][0], factor * (G - (G * v).sum(1, keepdim=True) * v), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [lambda: low_rank(True), whole], ids=["A and B", "V"])
def test_the_exact_gradients_are_those_of_the_formula(make: Any) -> None:
    layer, x, G = make(), drawn(7, 24, seed=9), drawn(7, 20, seed=10)
    names, values = zip(*((name, value) for name, value in layer.own_tensors()), strict=True)
    own = torch.autograd.grad((layer(x) * G).sum(), values)
    formula = torch.autograd.grad((functional.linear(x, effective(layer), layer.base.bias) * G).sum(), values)
    for name, one, other in zip(names, own, formula, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10, msg=name)


def test_the_length_of_v_means_nothing() -> None:
    layer, x = low_rank(True), drawn(7, 24, seed=9)
    expected = layer(x)
    for factor in (0.25, 3.0):
        scaled = low_rank(True)
        scaled.base.weight.data *= factor  # type: ignore[operator]
        scaled.squares *= factor**2
        scaled.lora_B.data *= factor
        torch.testing.assert_close(scaled(x), expected, rtol=1e-10, atol=1e-10)


def test_dropout_is_on_the_branch_of_low_rank_alone() -> None:
    """With no A to see there is nothing to drop."""
    layer, x = low_rank(exact=False, dropout=0.5).train(), drawn(7, 24, seed=9)
    assert not torch.equal(layer(x), layer(x))
    layer.lora_B.data.zero_()
    assert torch.equal(layer(x), layer(x))


def test_the_norms_of_a_weight_in_16_bits_are_float32s() -> None:
    """Of more rows than are turned into float32 at a time."""
    rough = nn.Linear(16, 1500, dtype=torch.bfloat16)
    layer = LowRankNormalizedLinear(rough, 2, 2.0, 0.0, exact=False)
    layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(0))
    V = rough.weight.float() + 2.0 * layer.lora_B @ layer.lora_A
    _, squares = layer.parts(drawn(3, 16, dtype=torch.bfloat16))
    torch.testing.assert_close(squares, V.square().sum(1), rtol=1e-5, atol=1e-6)
    assert layer(drawn(3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_layer_with_a_row_of_zeros_is_refused_by_its_name() -> None:
    net = Net()
    net.second.weight.data[3] = 0
    with pytest.raises(RequestInvalid, match="second has rows of zeros") as caught:
        prepare("gradnormlorp", {"rank": 4}, net, in_batches(ROWS))
    assert [error.pointer for error in caught.value.errors] == ["/parameters/target_modules"]


# The training.


def moved_rows(*, deferred: bool, steps: int = 50) -> int:
    """Rows of A that have moved at the end of the first space, R = 4 < r = 8, B beginning at 0."""
    torch.manual_seed(1)
    model = Net()
    method = prepare("gradnormlorp", {"rank": 8, "defer_first_svd": deferred}, model, in_batches(ROWS))
    layer = method.layers["first"]
    start, optimizer = layer.lora_A.detach().clone(), method.optimizer(model, method.context.settings)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**ROWS).loss.backward()
        optimizer.step()
    return int((layer.lora_A != start).any(dim=1).sum())


def test_all_rows_of_a_move_where_the_first_space_waits_for_a_gradient() -> None:
    assert moved_rows(deferred=True) == 8
    assert moved_rows(deferred=False) == R


def one_by_one(parameters_: dict[str, Any], steps: int = 12) -> tuple[Any, Net, list[int]]:
    """A net that is trained in the backward pass, its method, and how many gradients there were at each update."""
    torch.manual_seed(1)
    net, counts = Net(), list[int]()
    method = prepare(
        "gradnormlorp", parameters_ | {"update_in_backward": True}, net, in_batches(ROWS), max_grad_norm=0.0
    )
    optimizer = method.optimizer(net, method.context.settings)
    update = optimizer._update

    def counted(parameter: Tensor, group: Any) -> None:
        counts.append(sum(value.grad is not None for value in net.parameters()))
        update(parameter, group)

    optimizer._update = counted
    for _ in range(steps):
        net(**ROWS).loss.backward()
        assert all(value.grad is None for value in net.parameters())
        optimizer.step()
    return method, net, counts


@pytest.mark.parametrize(
    "parameters_",
    [{"rank": 4, "norm_grad": "exact"}, {"rank": 8, "optim_bits": 8}, {"mode": "full", "proj_rank": 2}],
    ids=["exact", "8 bits", "full"],
)
def test_updates_in_the_backward_pass_are_those_after_it_with_one_gradient_at_a_time(
    parameters_: dict[str, Any],
) -> None:
    parameters_ = {"update_proj_gap": 5, **parameters_}
    method, net, counts = one_by_one(parameters_)
    assert set(counts) == {1}
    torch.manual_seed(1)
    plain = Net()
    usual = prepare("gradnormlorp", parameters_, plain, in_batches(ROWS))
    optimizer = usual.optimizer(plain, usual.context.settings)
    for step in range(12):
        optimizer.zero_grad()
        plain(**ROWS).loss.backward()
        norm = float(torch.stack([value.grad.norm() for value in plain.parameters() if value.grad is not None]).norm())
        optimizer.step()
        told = usual.metrics()
        assert "gradient_norm" not in told
        assert told["new_spaces"] > 0 if step in (0, 5, 10) else True
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    assert method.metrics() == {"new_spaces": told["new_spaces"], "gradient_norm": pytest.approx(norm, rel=1e-5)}


def test_a_gradient_that_is_not_finite_ends_the_backward_pass() -> None:
    net = Net()
    method = prepare("gradnormlorp", {"update_in_backward": True}, net, in_batches(ROWS), max_grad_norm=0.0)
    method.optimizer(net, method.context.settings)
    before = [value.detach().clone() for value in net.parameters()]
    with pytest.raises(TrainingDiverged, match="norm of a gradient is nan"):
        net(**ROWS, factor=float("nan")).loss.backward()
    assert all(torch.equal(one, other) for one, other in zip(net.parameters(), before, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("parameters_", [{"rank": 4}, {"mode": "full", "proj_rank": 2}], ids=["adapter", "full"])
def test_a_training_with_updates_in_the_backward_pass_gives_the_same_bytes_and_resumes(
    trainings: Any, parameters_: dict[str, Any]
) -> None:
    settings = {"steps": 8, "gradient_accumulation": 1, "max_grad_norm": 0.0, "gradient_checkpointing": True}
    report, usual, watched = trainings.run("gradnormlorp", parameters_, **settings)
    at_once = parameters_ | {"update_in_backward": True}
    other, adapter, whole = trainings.run("gradnormlorp", at_once, checkpoint_steps=3, **settings)
    assert digests(adapter) == digests(usual)
    assert other.evaluation == report.evaluation
    for step, values in whole.points.items():
        assert values["gradient_norm"] == pytest.approx(watched.points[step]["gradient_norm"], rel=1e-5) != 0
    assert other.estimate["gradient_bytes"] < report.estimate["gradient_bytes"]
    again, resumed, _ = trainings.run("gradnormlorp", at_once, resume=whole.checkpoints[3], **settings)
    assert again.resumed_at == 3
    assert digests(resumed) == digests(adapter)


# The export.


def trained(net: nn.Module, parameters_: dict[str, Any], steps: int = 12) -> Any:
    """The method, after some steps on the rows."""
    method = prepare("gradnormlorp", parameters_, net, in_batches(ROWS))
    optimizer = method.optimizer(net, method.context.settings)
    for _ in range(steps):
        optimizer.zero_grad()
        net(**ROWS).loss.backward()
        optimizer.step()
    method.settle(net)
    return method


@pytest.mark.parametrize(
    "parameters_",
    [{"rank": 4, "alpha": 3.0}, {"mode": "full", "proj_rank": 2, "update_proj_gap": 5}],
    ids=["adapter", "full"],
)
def test_the_export_is_a_dora_adapter_of_peft(tmp_path: Path, parameters_: dict[str, Any]) -> None:
    net = Net()
    method = trained(net, parameters_, steps=10)
    method.context = replace(method.context, task_type=None)  # a net that PEFT knows no task of
    method.export(net, tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    parts = {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"}
    assert names == {f"base_model.model.{path}.{part}" for path in ("first", "second") for part in parts}
    with peft_deprecations_ignored():
        loaded = PeftModel.from_pretrained(Net(), str(tmp_path)).eval()
    with torch.no_grad():
        expected, plain = net.outputs(ROWS["inputs"]), Net().outputs(ROWS["inputs"])
        torch.testing.assert_close(loaded.base_model.model.outputs(ROWS["inputs"]), expected, rtol=0, atol=1e-5)
        assert float((expected - plain).abs().max()) > 1e-2
        merged = loaded.merge_and_unload()
        for path in ("first", "second"):
            weight = effective(method.layers[path])
            torch.testing.assert_close(getattr(merged, path).weight, weight, rtol=0, atol=1e-5)


def test_it_trains_what_pefts_dora_trains() -> None:
    """The same gradients from the same factors."""
    net = Net()
    method = prepare("gradnormlorp", {"rank": 4, "alpha": 8.0}, net, in_batches(ROWS))
    with peft_deprecations_ignored():
        config = LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["first", "second"])
        stock = get_peft_model(Net(), config)
    for path, layer in method.layers.items():
        other = stock.base_model.model.get_submodule(path)
        layer.lora_B.data.copy_(drawn(*layer.lora_B.shape, seed=3))
        other.lora_A["default"].weight.data.copy_(layer.lora_A)
        other.lora_B["default"].weight.data.copy_(layer.lora_B)
    net(**ROWS).loss.backward()
    stock(**ROWS).loss.backward()
    for path, layer in method.layers.items():
        other = stock.base_model.model.get_submodule(path)
        torch.testing.assert_close(layer.lora_A.grad, other.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.lora_B.grad, other.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-6)
        norms = other.lora_magnitude_vector["default"].weight.grad
        torch.testing.assert_close(layer.magnitude.grad, norms, rtol=1e-4, atol=1e-6)


# Whole weights.


def test_what_whole_weights_learn_has_the_rank_of_the_spaces() -> None:
    layer = whole()
    layer.change.data.zero_()
    optimizer = ProjectedAdamW(
        [{"params": [layer.change], "projected": True}, {"params": [layer.magnitude]}], Projection(3, T), lr=0.01
    )
    for step in range(3 * T):
        optimizer.zero_grad()
        x, target = drawn(32, 24, seed=step), drawn(32, 20, seed=1000 + step)
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    singular = torch.linalg.svdvals(layer.change.detach())
    assert int((singular > 1e-10 * singular[0]).sum()) == 3 * 3


def test_the_export_of_whole_weights_has_that_rank_and_loses_nothing() -> None:
    net = Net()
    method = trained(net, {"mode": "full", "proj_rank": 2, "update_proj_gap": 5}, steps=10)
    told = method.report(net)
    assert told["ranks"] == {"first": 4, "second": 4}
    assert told["left_out"] < 1e-5
    for path, layer in method.layers.items():
        found = method.factors(path, layer)
        torch.testing.assert_close(found.B @ found.A, layer.change.detach(), rtol=0, atol=1e-6)


def test_a_learnt_norm_outlives_the_step() -> None:
    """Directions that stand still; the target is W with other lengths of its rows."""
    layer = whole()
    layer.change.data.zero_()
    target = torch.linspace(0.5, 1.6, 20).double()[:, None] * layer.weight.detach()
    optimizer = ProjectedAdamW([{"params": [layer.magnitude]}], Projection(R, T), lr=0.05)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (effective(layer) - target).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < 0.01 * losses[0]


def test_the_report_measures_what_the_optimiser_keeps() -> None:
    told = {rank: trained(Net(), {"rank": 8, "proj_rank": rank}).report(nn.Module())["optimizer"] for rank in (2, 8)}
    norms = 8 * (14 + 9)
    bases = {rank: 4 * 2 * 2 * 8 * rank for rank in told}  # of two layers with two factors each
    moments = {rank: 8 * rank * (10 + 14 + 14 + 9) for rank in told}
    for rank, found in told.items():
        assert found["bytes"] == norms + bases[rank] + moments[rank]
        assert found["adamw_bytes"] == norms + 8 * 8 * (10 + 14 + 14 + 9)
        assert (found["projected"], found["proj_rank"], found["spaces"], found["in_8_bits"]) == (4, rank, 1, [])
    assert told[2]["bytes"] < told[2]["adamw_bytes"] < told[8]["bytes"]
