"""LoRA-SB and LoRA-XS: the exact properties of the start, of the gradient and of the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_nets import Net, in_batches, loss_of, prepare, regression_rows
from torch import Tensor, nn

from train.catalog import METHODS, parse_parameters
from train.full_gradients import full_gradients
from train.methods.lora_sb import best_factors, first_update
from train.methods.three_factor import MIDDLE, ThreeFactorLinear, ThreeFactors
from train.options.three_factor import LoraSbOptions
from train.settings import TrainingSettings
from train.truncated_svd import truncated_svd

DOUBLE, SINGLE = 1e-12, 1e-5
ROWS = regression_rows()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(rows: int = 12, columns: int = 9, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=generator(seed), dtype=torch.float64)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(matrix(rows, columns, seed)).Q


def gradients(net: nn.Module, rows: dict[str, Tensor] = ROWS) -> dict[str, Tensor]:
    """By plain autograd: the sum over the rows of the gradient of each row's loss."""
    copied = Net()
    copied.load_state_dict(net.state_dict())
    copied.requires_grad_(True)
    for number in range(len(rows["inputs"])):
        copied(**{name: value[number : number + 1] for name, value in rows.items()}).loss.backward()
    return {path: getattr(copied, path).weight.grad for path in ("first", "second")}


@pytest.fixture(scope="module")
def net() -> Net:
    return Net()


@pytest.fixture(scope="module")
def prepared(net: Net) -> tuple[Any, Net]:
    """LoRA-SB of rank 4 on all rows, eta 0.01."""
    model = Net()
    return prepare("lora-sb", {"rank": 4, "samples": 24, "eta": 0.01}, model, in_batches(ROWS)), model


def test_the_estimate_is_the_sum_of_the_gradients_of_the_rows(net: Net) -> None:
    rows = [{name: value[number : number + 1] for name, value in ROWS.items()} for number in range(24)]
    expected = gradients(net)
    for memory in (1, 10 * 14 * 4, 10**9):
        for found in full_gradients(net, ["first", "second"], rows, memory_bytes=memory, seed=0):
            torch.testing.assert_close(found.total, expected[found.paths[0]], rtol=1e-5, atol=1e-6)


def test_the_outer_factors_are_orthonormal_and_frozen(prepared: tuple[Any, Net]) -> None:
    method, model = prepared
    for layer in method.layers.values():
        factors = layer.factors
        torch.testing.assert_close(factors.B.T @ factors.B, torch.eye(4), atol=SINGLE, rtol=0)
        torch.testing.assert_close(factors.A @ factors.A.T, torch.eye(4), atol=SINGLE, rtol=0)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {"first.lora_R", "second.lora_R"}


def test_training_moves_the_middle_alone() -> None:
    model = Net()
    method = prepare("lora-sb", {"rank": 4, "samples": 24}, model, in_batches(ROWS))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**ROWS).loss.backward()
        optimizer.step()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"first.lora_R", "second.lora_R"}
    assert all(isinstance(layer, ThreeFactorLinear) for layer in method.layers.values())


def test_the_start_is_the_best_approximation_of_the_first_step() -> None:
    """Eckart–Young: what is left has the norm of the singular values that were cut."""
    step = first_update(matrix(), 0.01, 1)
    singular = torch.linalg.svdvals(step)
    factors, share = best_factors(step, 4, generator())
    left = float((step - factors.B @ factors.R @ factors.A).norm())
    assert left == pytest.approx(float(singular[4:].norm()), abs=DOUBLE)
    assert share == pytest.approx(float(singular[:4].square().sum() / step.square().sum()), abs=DOUBLE)


def test_the_start_of_the_layers_is_that_of_their_own_gradients(prepared: tuple[Any, Net], net: Net) -> None:
    method, _ = prepared
    for path, gradient in gradients(net).items():
        step = -0.01 * gradient.sign()
        factors = method.layers[path].factors
        u, s, vt = torch.linalg.svd(step)
        best = u[:, :4] @ torch.diag(s[:4]) @ vt[:4]
        torch.testing.assert_close(factors.B @ factors.R @ factors.A, best, atol=SINGLE * 0.1, rtol=0)
        diagonal = torch.diagonal(factors.R)
        assert torch.equal(factors.R, torch.diag(diagonal))
        assert float(diagonal.min()) >= 0
        assert torch.equal(diagonal, diagonal.sort(descending=True).values)
        assert float((gradient * (factors.B @ factors.R @ factors.A)).sum()) < 0


def test_the_start_lowers_the_loss_on_the_samples(net: Net) -> None:
    model = Net()
    prepare("lora-sb", {"rank": 4, "samples": 24, "eta": 1e-3}, model, in_batches(ROWS))
    assert loss_of(model, ROWS) < loss_of(net, ROWS)


def pair(
    scaling: float = 1.0, *, orthonormal_factors: bool = True, start: float = 0.1
) -> tuple[ThreeFactorLinear, Tensor, Tensor, Tensor]:
    """A layer in float64 with only R trained; inputs, labels, W."""
    base = nn.Linear(9, 12, bias=False, dtype=torch.float64)
    weight = matrix(12, 9, 3)
    base.weight.data.copy_(weight)
    b, a = (orthonormal(12, 4, 4), orthonormal(9, 4, 5).T) if orthonormal_factors else (matrix(12, 4), matrix(4, 9, 1))
    layer = ThreeFactorLinear(base, ThreeFactors(a, start * matrix(4, 4, 6), b), scaling=scaling, trained=MIDDLE)
    return layer, matrix(32, 9, 7), matrix(32, 12, 8), weight


def run(layer: ThreeFactorLinear, inputs: Tensor) -> Tensor:
    """The layer in float64 throughout."""
    found: Tensor = layer.base(inputs) + layer.adapter(inputs)
    return found


def effective(layer: ThreeFactorLinear) -> Tensor:
    factors = layer.factors
    return layer.weight.detach() + layer.scaling * factors.B @ factors.R @ factors.A


def descend(layer: ThreeFactorLinear, inputs: Tensor, labels: Tensor, steps: int, rate: float = 0.05) -> float:
    """SGD on R beside full descent with the projected gradient; the largest distance of the two weights."""
    factors = layer.factors
    left = factors.B @ torch.linalg.pinv(factors.B)
    right = torch.linalg.pinv(factors.A) @ factors.A
    full, largest = effective(layer), 0.0
    for _ in range(steps):
        layer.zero_grad()
        (run(layer, inputs) - labels).square().mean().backward()
        twin = full.clone().requires_grad_(True)
        (inputs @ twin.T - labels).square().mean().backward()
        with torch.no_grad():
            assert layer.lora_R.grad is not None
            assert twin.grad is not None
            layer.lora_R -= rate * layer.lora_R.grad
            full -= rate * left @ twin.grad @ right
        largest = max(largest, float((effective(layer) - full).abs().max()))
    return largest


def test_the_gradient_of_the_middle_is_the_projected_full_gradient_in_every_step() -> None:
    layer, inputs, labels, _ = pair()
    twin = effective(layer).requires_grad_(True)
    (inputs @ twin.T - labels).square().mean().backward()
    (run(layer, inputs) - labels).square().mean().backward()
    assert layer.lora_R.grad is not None
    assert twin.grad is not None
    torch.testing.assert_close(
        layer.lora_R.grad, layer.factors.B.T @ twin.grad @ layer.factors.A.T, atol=DOUBLE, rtol=0
    )
    assert descend(layer, inputs, labels, 20) < DOUBLE


@pytest.mark.parametrize("broken", [{"scaling": 2.0}, {"orthonormal_factors": False}])
def test_a_scaling_or_factors_that_are_not_orthonormal_break_the_equivalence(broken: dict[str, Any]) -> None:
    layer, inputs, labels, _ = pair(**broken)
    assert descend(layer, inputs, labels, 20) > 1e-3


def test_dropout_breaks_the_equivalence_in_training_mode() -> None:
    layer, inputs, labels, _ = pair()
    layer.dropout = 0.5
    assert descend(layer, inputs, labels, 20) > 1e-3
    assert descend(layer.eval(), inputs, labels, 20) < DOUBLE


def test_the_gradient_of_the_middle_is_the_best_of_all_in_the_subspace() -> None:
    """min ‖B·M·A − g‖ by least squares over all M is Bᵀ·g·Aᵀ."""
    b, a, g = orthonormal(12, 4, 1), orthonormal(9, 4, 2).T, matrix()
    system = torch.kron(b.contiguous(), a.T.contiguous())
    solved = torch.linalg.lstsq(system, g.reshape(-1, 1)).solution.reshape(4, 4)
    torch.testing.assert_close(solved, b.T @ g @ a.T, atol=DOUBLE, rtol=0)


def test_the_best_equivalent_gradient_does_not_depend_on_the_scaling() -> None:
    """With any factors and s = 3.7, (BᵀB)⁻¹·g_R·(AAᵀ)⁻¹/s² from the layer's gradient gives the projected gradient."""
    layer, inputs, labels, _ = pair(3.7, orthonormal_factors=False)
    twin = effective(layer).requires_grad_(True)
    (inputs @ twin.T - labels).square().mean().backward()
    (run(layer, inputs) - labels).square().mean().backward()
    b, a, s = layer.factors.B, layer.factors.A, 3.7
    assert layer.lora_R.grad is not None
    assert twin.grad is not None
    best = torch.linalg.inv(b.T @ b) @ layer.lora_R.grad @ torch.linalg.inv(a @ a.T) / s**2
    projected = b @ torch.linalg.pinv(b) @ twin.grad @ torch.linalg.pinv(a) @ a
    torch.testing.assert_close(s * b @ best @ a, projected, atol=DOUBLE, rtol=0)


def test_the_raw_step_spans_the_best_subspace_of_the_first_gradient() -> None:
    g = matrix()
    factors, _ = best_factors(first_update(g.clone(), 0.01, 7, raw=True), 4, generator())
    projected = factors.B @ factors.B.T @ g @ factors.A.T @ factors.A
    assert float((projected - g).norm()) == pytest.approx(float(torch.linalg.svdvals(g)[4:].norm()), abs=DOUBLE)
    torch.testing.assert_close(first_update(g.clone(), 0.01, 7, raw=True), -0.01 * g / 7)
    signed, _ = best_factors(first_update(g.clone(), 0.01, 7), 4, generator())
    spread = signed.B @ signed.B.T @ g @ signed.A.T @ signed.A
    assert float((spread - g).norm()) > float((projected - g).norm()) * 1.01


def test_the_number_of_trained_parameters_is_that_of_the_paper(prepared: tuple[Any, Net]) -> None:
    """Mistral-7B at rank 96: 32 layers of 7 weights."""
    for name in ("lora-sb", "lora-xs", "inttune"):
        options = parse_parameters(name, {"rank": 96})
        assert 32 * 7 * options.parameters_of(4096, 14336) == 2_064_384
    assert sum(value.numel() for value in prepared[1].parameters() if value.requires_grad) == 2 * 4 * 4


@pytest.mark.parametrize("name", ["lora-sb", "lora-xs"])
def test_the_export_gives_the_outputs_of_the_trained_layers(name: str, net: Net) -> None:
    model = Net()
    method = prepare(name, {"rank": 4, "samples": 24} if name == "lora-sb" else {"rank": 4}, model, in_batches(ROWS))
    with torch.no_grad():
        for layer in method.layers.values():
            layer.lora_R.add_(torch.randn(4, 4, generator=generator(9)))
    inputs = ROWS["inputs"]
    model.requires_grad_(False)
    folded = Net().requires_grad_(False)
    for path, layer in method.layers.items():
        found = method.factors(path, layer)
        assert (found.rank, found.scaling) == (4, 1.0)
        assert float(found.A.norm()) == pytest.approx(float(found.B.norm()), rel=0.9)
        getattr(folded, path).weight.add_(found.scaling * found.B @ found.A)
    torch.testing.assert_close(folded.outputs(inputs), model.outputs(inputs), atol=SINGLE, rtol=0)
    assert not torch.allclose(net.outputs(inputs), model.outputs(inputs), atol=0.1)


def test_the_step_of_adamw_has_one_length_and_no_scale() -> None:
    g = matrix()
    g[0, 0] = 0
    step = first_update(g.clone(), 0.01, 5)
    assert set(step.unique().tolist()) == {-0.01, 0.0, 0.01}
    first, _ = best_factors(step, 4, generator())
    again, _ = best_factors(first_update(37.5 * g, 0.01, 5), 4, generator())
    torch.testing.assert_close(first.B @ first.R @ first.A, again.B @ again.R @ again.A, atol=DOUBLE, rtol=0)
    raw = [best_factors(first_update(k * g, 0.01, 5, raw=True), 4, generator())[0] for k in (1, 37.5)]
    assert float(raw[1].R.norm()) == pytest.approx(37.5 * float(raw[0].R.norm()))


def test_the_length_of_the_step_is_that_of_the_first_warm_up_step_within_reason() -> None:
    def length(parameters: dict[str, Any], **training: Any) -> float:
        options = parse_parameters("lora-sb", parameters)
        assert isinstance(options, LoraSbOptions)
        return options.step_length(TrainingSettings(**training))

    assert length({}, learning_rate=1e-4, warmup_steps=31) == pytest.approx(1e-4 / 31)
    assert length({}, learning_rate=1e-3) == 1e-5
    assert length({"update": "raw"}, learning_rate=1e-3) == 1e-3
    assert length({"eta": 0.02}, learning_rate=1e-3, warmup_steps=10) == 0.02


def test_lora_xs_keeps_the_singular_vectors_of_the_weight(net: Net) -> None:
    model = Net()
    method = prepare("lora-xs", {"rank": 4}, model, in_batches(ROWS))
    for path, layer in method.layers.items():
        factors, weight = layer.factors, getattr(net, path).weight.detach()
        u, s, vt = torch.linalg.svd(weight)
        torch.testing.assert_close(factors.B @ factors.A, u[:, :4] @ torch.diag(s[:4]) @ vt[:4], atol=SINGLE, rtol=0)
        torch.testing.assert_close(factors.B.T @ factors.B, torch.eye(4), atol=SINGLE, rtol=0)
        assert 0 < float(factors.R.abs().max()) < 1e-4
        assert [name for name, value in layer.named_parameters() if value.requires_grad] == ["lora_R"]


def test_a_large_matrix_is_decomposed_in_a_random_subspace_as_exactly_as_needed() -> None:
    """With a spectrum that falls, the cut decomposition keeps all but a ten-thousandth of what the exact one does."""
    spectrum = 0.9 ** torch.arange(80, dtype=torch.float64)
    large = orthonormal(120, 80, 1) @ torch.diag(spectrum) @ orthonormal(80, 80, 2).T
    u, s, vt = truncated_svd(large, 8, generator(), exact_side=40)
    torch.testing.assert_close(s, spectrum[:8], rtol=1e-6, atol=0)
    torch.testing.assert_close(u.T @ u, torch.eye(8, dtype=torch.float64), atol=DOUBLE, rtol=0)
    torch.testing.assert_close(vt @ vt.T, torch.eye(8, dtype=torch.float64), atol=DOUBLE, rtol=0)
    assert float((large - u @ torch.diag(s) @ vt).norm()) == pytest.approx(float(spectrum[8:].norm()), rel=1e-4)


def test_every_row_of_the_menu_with_a_middle_matrix_is_a_plain_lora() -> None:
    for name in ("lora-sb", "lora-xs", "slora", "nlora", "inttune"):
        assert METHODS[name].capabilities.exports == "lora"
        assert METHODS[name].capabilities.mergeable


def test_going_on_needs_no_estimate(prepared: tuple[Any, Net], tmp_path: Path) -> None:
    method, model = prepared
    method.save(model, tmp_path)

    def nothing() -> Any:
        raise AssertionError("the rows are not needed")

    again = prepare("lora-sb", {"rank": 4, "samples": 24}, Net(), nothing, checkpoint=tmp_path)
    again.load_state(method.state())
    for path, layer in method.layers.items():
        for (name, value), (other, same) in zip(layer.own_tensors(), again.layers[path].own_tensors(), strict=True):
            assert name == other
            assert torch.equal(value, same)
    assert again.report(model) == method.report(model)
    told = method.report(model)["first_update"]
    assert (told["samples"], told["passes"], told["eta"]) == (24, 1, 0.01)
    assert 0 < told["energy_kept"]["least"] <= told["energy_kept"]["mean"] < 1
