"""ALLoRA: the gradients are the published ones, in both placements, and the export is a plain LoRA."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from allora_layers import D_IN, D_OUT, RANK, drawn, factors, layer_of, trained_once
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from train.catalog import find_method, parse_parameters
from train.methods.allora import Allora, AlloraLinear, RowScaledProduct, row_factors, row_scaled_optimizer
from train.protocol import MethodContext
from train.quiet import peft_deprecations_ignored
from train.settings import TrainingSettings

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def plain(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The branch of a LoRA of scaling 1."""
    return x @ A.T @ B.T


def scaled(x: Tensor, A: Tensor, B: Tensor, eta: float = 2.0) -> Tensor:
    s = row_factors(A.detach(), B.detach(), eta**-2)
    result: Tensor = RowScaledProduct.apply(x, A, B, s, True, A.dtype)
    return result


def gradients(branch: Any, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """∂x, ∂A and ∂B of ⟨g, branch(x)⟩ at `factors()`."""
    A, B = factors(x.dtype)
    x = x.clone().requires_grad_()
    found: tuple[Tensor, Tensor, Tensor] = torch.autograd.grad(branch(x, A, B), (x, A, B), g)
    return found


@pytest.fixture(scope="module")
def both() -> dict[str, Any]:
    """The gradients of ALLoRA and of a plain LoRA for the same tokens."""
    x, g = drawn(2, 5, D_IN, seed=2), drawn(2, 5, D_OUT, seed=3)
    A, B = (value.detach() for value in factors())
    names = ("x", "A", "B")
    return {
        "allora": dict(zip(names, gradients(scaled, x, g), strict=True)),
        "plain": dict(zip(names, gradients(plain, x, g), strict=True)),
        "s": 1 / ((B @ A).norm(dim=1) + 1 / 4).sqrt(),
        "G": g.flatten(0, 1).T @ x.flatten(0, 1),
        "B": B,
    }


def test_the_gradient_of_b_is_the_ordinary_one_with_row_i_times_s_i(both: dict[str, Any]) -> None:
    torch.testing.assert_close(both["allora"]["B"], both["s"][:, None] * both["plain"]["B"], **EXACT)
    assert float((both["allora"]["B"] / both["plain"]["B"]).std()) > 0.1  # and a plain LoRA's is another


def test_the_gradient_of_a_mixes_the_rows_by_s_and_is_no_rescaling(both: dict[str, Any]) -> None:
    found, ordinary = both["allora"]["A"], both["plain"]["A"]
    torch.testing.assert_close(found, both["B"].T @ (both["s"][:, None] * both["G"]), **EXACT)
    ratio = found / ordinary
    assert bool((ratio.std(dim=0) > 0.01).all())
    assert bool((ratio.std(dim=1) > 0.01).all())


def test_the_gradient_that_goes_on_to_lower_layers_is_the_ordinary_one(both: dict[str, Any]) -> None:
    torch.testing.assert_close(both["allora"]["x"], both["plain"]["x"], **EXACT)


def test_a_lower_layer_learns_from_the_ordinary_gradient() -> None:
    x, g = drawn(6, D_IN), drawn(6, D_OUT, seed=3)
    found = []
    for branch in (scaled, plain):
        lower = drawn(D_IN, D_IN, seed=5).requires_grad_()
        hidden = torch.tanh(x @ lower.T)
        y = hidden @ drawn(D_OUT, D_IN, seed=6).T + branch(hidden, *factors())
        found.append(torch.autograd.grad(y, lower, g)[0])
    torch.testing.assert_close(found[0], found[1], **EXACT)


def test_inputs_of_any_number_of_dimensions_give_the_same_gradients() -> None:
    x, g = drawn(12, D_IN), drawn(12, D_OUT, seed=3)
    flat = gradients(scaled, x, g)
    for shape in ((3, 4), (2, 2, 3)):
        found = gradients(scaled, x.reshape(*shape, D_IN), g.reshape(*shape, D_OUT))
        torch.testing.assert_close(found[1:], flat[1:], **EXACT)
        torch.testing.assert_close(found[0].reshape(12, D_IN), flat[0], **EXACT)


def test_micro_batches_add_up_to_the_gradient_of_the_large_batch() -> None:
    x, g = drawn(12, D_IN), drawn(12, D_OUT, seed=3)
    parts = [gradients(scaled, x[at : at + 4], g[at : at + 4]) for at in (0, 4, 8)]
    for found, whole in zip(zip(*parts, strict=True), gradients(scaled, x, g), strict=True):
        added = torch.cat(found) if whole.shape == x.shape else sum(found)
        torch.testing.assert_close(added, whole, **EXACT)


def test_factors_follow_the_norms_of_the_rows_of_the_product() -> None:
    A, B = (value.detach() for value in factors())
    norms = (B @ A).norm(dim=1)
    torch.testing.assert_close(row_factors(A, B, 0.25), 1 / (norms + 0.25).sqrt(), **EXACT)
    ordered = row_factors(A, B, 0.25)[norms.argsort()]
    assert bool((ordered.diff() < 0).all())
    assert row_factors(torch.tensor([[3.75, 0.0]]), torch.ones(1, 1), 0.25).tolist() == [0.5]


@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0, 8.0])
def test_a_row_that_is_zero_has_the_factor_eta(eta: float) -> None:
    found = row_factors(drawn(RANK, D_IN, dtype=torch.float32), torch.zeros(D_OUT, RANK), eta**-2)
    assert found.tolist() == [eta] * D_OUT


def test_rounding_below_zero_gives_no_nan() -> None:
    A = torch.ones(2, 50) * 1.1 + 1e-6 * drawn(2, 50, dtype=torch.float32)
    B = torch.tensor([[1.0, -1.0]]).repeat(40, 1) * torch.logspace(-3, 3, 40)[:, None]
    assert bool(torch.isfinite(row_factors(A, B, 0.25)).all())


@pytest.mark.parametrize("eta", [0.5, 2.0])
def test_the_first_step_of_descent_is_eta_times_that_of_a_plain_lora(eta: float) -> None:
    layer, ordinary = layer_of(eta=eta), layer_of(scale_B=False)
    start = layer.lora_A.detach().clone()
    trained_once(layer)
    trained_once(ordinary)
    torch.testing.assert_close(layer.lora_B, eta * ordinary.lora_B)
    assert torch.equal(layer.lora_A, start)
    assert torch.equal(ordinary.lora_A, start)


class Network(nn.Module):
    """A linear layer, and one that keeps its weight the other way round."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(D_IN, D_OUT), Conv1D(D_IN, D_OUT)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.tanh(self.first(x)))
        return result


def adapted(parameters: dict[str, Any], **settings: Any) -> tuple[Network, Allora]:
    method = find_method("allora").load(parse_parameters("allora", {"rank": RANK, **parameters}))
    assert isinstance(method, Allora)
    network = Network()
    method.prepare(
        network,
        MethodContext(["first", "second"], 1, lambda: iter(()), TrainingSettings(**settings), task_type=None),
    )
    return network, method


def test_the_start_changes_no_output_and_the_export_is_a_plain_lora_of_scaling_one(tmp_path: Path) -> None:
    network, method = adapted({})
    x = drawn(2, 3, D_IN, dtype=torch.float32)
    assert torch.equal(network(x), Network()(x))
    for number, layer in enumerate(method.layers.values()):
        assert isinstance(layer, AlloraLinear)
        nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(number))
    method.export(network, tmp_path)
    with peft_deprecations_ignored(), pytest.warns(UserWarning, match="fan_in_fan_out"):
        loaded = PeftModel.from_pretrained(Network(), str(tmp_path))
    assert loaded.peft_config["default"].lora_alpha == loaded.peft_config["default"].r == RANK
    torch.testing.assert_close(loaded(x), network(x))
    assert float((network(x) - Network()(x)).detach().abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_precision_and_leaves_float32_gradients(dtype: torch.dtype) -> None:
    found = {}
    for enabled in (True, False):
        network, method = adapted({})
        with torch.no_grad():
            for layer in method.layers.values():
                layer.get_parameter("lora_B").normal_(generator=torch.Generator().manual_seed(0))
        method.before_step(network, 0)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            y = network(drawn(2, 5, D_IN, dtype=torch.float32))
            assert y.dtype == (dtype if enabled else torch.float32)
            loss = y.float().square().mean()
        loss.backward()
        found[enabled] = [value.grad for value in network.parameters() if value.requires_grad]
    assert {value.dtype for value in found[True]} == {torch.float32}
    for rounded, exact in zip(found[True], found[False], strict=True):
        assert float((rounded - exact).norm() / exact.norm()) < 0.03


# The placement "update".


def updated(kind: str, eta: float, steps: int = 1, **settings: Any) -> AlloraLinear:
    layer = layer_of(eta=eta, scale_B=False)
    made = row_scaled_optimizer([layer], [], TrainingSettings(optimizer=kind, learning_rate=0.01, **settings))
    for _ in range(steps):
        trained_once(layer, made)
    return layer


def with_gradient(kind: type[torch.optim.Optimizer], eta: float, steps: int = 1) -> AlloraLinear:
    layer = layer_of(eta=eta)
    optimizer = kind([layer.lora_A, layer.lora_B], lr=0.01)  # type: ignore[call-arg]
    for _ in range(steps):
        trained_once(layer, optimizer)
    return layer


def test_under_adamw_eta_acts_on_the_update_and_all_but_vanishes_in_the_gradient() -> None:
    first, eighth = (with_gradient(torch.optim.AdamW, eta).lora_B for eta in (1.0, 8.0))
    torch.testing.assert_close(first, eighth, rtol=1e-4, atol=0)
    first, eighth = (updated("adamw", eta).lora_B for eta in (1.0, 8.0))
    torch.testing.assert_close(8 * first, eighth, rtol=1e-6, atol=0)


def test_under_plain_descent_both_placements_move_b_alike_and_a_by_the_root_mean_square_of_s() -> None:
    states = {}
    for name in ("gradient", "update"):
        layer = layer_of(scale_B=name == "gradient")
        with torch.no_grad():
            layer.lora_B.copy_(factors(torch.float32)[1])
        before = layer.lora_A.detach().clone()
        settings = TrainingSettings(optimizer="sgd", learning_rate=0.01)
        made = row_scaled_optimizer([layer], [], settings) if name == "update" else None
        trained_once(layer, made or torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.01))
        states[name] = (layer.lora_A.detach() - before, layer.lora_B.detach(), layer.row_factor)
    torch.testing.assert_close(states["update"][1], states["gradient"][1])
    rms = states["update"][2].square().mean().sqrt()
    torch.testing.assert_close(states["update"][0], rms * states["gradient"][0], rtol=1e-3, atol=1e-6)
    assert abs(float(rms) - 1) > 0.1


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_decay_of_the_weights_is_not_multiplied(kind: str) -> None:
    layer = layer_of(eta=8.0, scale_B=False)
    with torch.no_grad():
        layer.lora_B.fill_(1.0)
    layer.renew_row_factor()
    expected = [0.9 * value.detach().clone() for value in (layer.lora_A, layer.lora_B)]
    made = row_scaled_optimizer([layer], [], TrainingSettings(optimizer=kind, learning_rate=0.5, weight_decay=0.2))
    for value in (layer.lora_A, layer.lora_B):
        value.grad = torch.zeros_like(value)
    made.step()
    torch.testing.assert_close([layer.lora_A.detach(), layer.lora_B.detach()], expected)


def test_modules_that_are_trained_whole_are_updated_as_usual() -> None:
    layer, head, alone = layer_of(scale_B=False), nn.Linear(D_OUT, 2), nn.Linear(D_OUT, 2)
    alone.load_state_dict(head.state_dict())
    settings = TrainingSettings(learning_rate=0.01, weight_decay=0.1)
    made = row_scaled_optimizer([layer], list(head.parameters()), settings)
    usual = torch.optim.AdamW(
        [{"params": [alone.weight]}, {"params": [alone.bias], "weight_decay": 0.0}], lr=0.01, weight_decay=0.1
    )
    x = drawn(4, D_OUT, dtype=torch.float32)
    for _ in range(3):
        for module, optimizer in ((head, made), (alone, usual)):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(head.state_dict(), alone.state_dict())


def test_a_step_that_overflow_forbids_changes_nothing() -> None:
    layer = layer_of(scale_B=False)
    made = row_scaled_optimizer([layer], [], TrainingSettings(learning_rate=0.01, weight_decay=0.1))
    before = copy.deepcopy(layer.state_dict())
    scaler = torch.amp.GradScaler("cpu")
    loss = layer(drawn(4, D_IN, dtype=torch.float32)).sum() * float("inf")
    scaler.scale(loss).backward()
    scaler.step(made)
    scaler.update()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_factors_are_computed_once_a_step_also_with_parts_of_a_batch_and_recomputed_activations(
    trainings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    renew = AlloraLinear.renew_row_factor

    def counted(layer: AlloraLinear) -> None:
        calls.append(layer)
        renew(layer)

    monkeypatch.setattr(AlloraLinear, "renew_row_factor", counted)
    settings = {"steps": 3, "gradient_accumulation": 2, "optimizer": "sgd"}
    written = []
    for again in (True, False):
        calls.clear()
        report, adapter, watcher = trainings.run("allora", {"rank": 4}, gradient_checkpointing=again, **settings)
        assert len(calls) == report.target_modules * (1 + 3)
        written.append(hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest())
    assert written[0] == written[1]
    shown = [watcher.points[step]["mean_row_factor"] for step in (1, 2, 3)]
    assert shown[0] == 2.0
    assert shown[0] > shown[1] > shown[2] > 0
    assert report.warnings == []


def test_the_other_placement_resumes_to_the_same_bytes_in_bfloat16(trainings: Any) -> None:
    parameters = {"rank": 4, "placement": "update", "eta_sq": 4.0}
    settings = {"steps": 6, "weight_decay": 0.1, "precision": "bfloat16", "learning_rate": 0.005}
    report, adapter, whole = trainings.run("allora", parameters, checkpoint_steps=4, **settings)
    _, resumed, _ = trainings.run("allora", parameters, resume=whole.checkpoints[4], **settings)
    assert (resumed / "adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()
    assert report.evaluation["after"]["loss"] < report.evaluation["before"]["loss"] - 0.3
    assert report.warnings == []
