"""SLoRA, NLoRA and IntTune: the exact properties of their starts, gradients and exports; what all of them refuse."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from small_nets import Net, in_batches, prepare, regression_rows
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from artifacts.errors import RequestInvalid
from train.catalog import parse_parameters
from train.methods.nlora import nystrom
from train.methods.three_factor import ThreeFactorLinear
from train.options.common import Circumstances, Target
from train.quiet import peft_deprecations_ignored
from train.settings import TrainingSettings
from train.targets import check_method

SINGLE = 1e-5
ROWS = regression_rows()
BATCHES = in_batches(ROWS)
FAMILY = ("slora", "nlora", "inttune")


def train(model: nn.Module, steps: int, rate: float = 0.05) -> None:
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**ROWS).loss.backward()
        optimizer.step()


def delta(layer: ThreeFactorLinear) -> Tensor:
    factors = layer.factors
    return layer.scaling * factors.B @ factors.R @ factors.A


def digest(weight: Tensor) -> str:
    return hashlib.sha256(weight.detach().numpy().tobytes()).hexdigest()


def test_slora_begins_at_the_base_model_and_moves_b_first() -> None:
    net, model = Net(), Net()
    method = prepare("slora", {"rank": 4}, model, BATCHES)
    assert torch.equal(model.outputs(ROWS["inputs"]), net.outputs(ROWS["inputs"]))
    model(**ROWS).loss.backward()
    for layer in method.layers.values():
        assert not layer.lora_A.grad.any()
        assert not layer.lora_R.grad.any()
        assert layer.lora_B.grad.any()
    model.zero_grad()
    train(model, 1)
    model(**ROWS).loss.backward()
    for layer in method.layers.values():
        assert all(value.grad.any() for value in (layer.lora_A, layer.lora_R, layer.lora_B))


def test_slora_draws_a_and_the_middle_uniformly_as_kaiming() -> None:
    layer = prepare("slora", {"rank": 8}, Net(), BATCHES).layers["first"]
    for value, bound in ((layer.lora_A, 10**-0.5), (layer.lora_R, 8**-0.5)):
        largest = float(value.detach().abs().max())
        assert 0.9 * bound < largest <= bound
    assert not layer.lora_B.any()


@pytest.mark.parametrize("name", ["nlora", "inttune"])
def test_the_start_adds_to_the_base_model_unless_it_is_taken_out(name: str) -> None:
    inputs = ROWS["inputs"]
    net, plain, residual = Net(), Net(), Net()
    layer = prepare(name, {"rank": 4, "alpha": 2.0}, plain, BATCHES).layers["first"]
    expected = 0.5 * inputs @ (layer.lora_B @ layer.lora_R @ layer.lora_A).T
    added = plain.first(inputs) - net.first(inputs)
    torch.testing.assert_close(added, expected, atol=SINGLE, rtol=0)
    assert bool((added.abs() > 1e-3).any())
    method = prepare(name, {"rank": 4, "alpha": 2.0, "residual": True}, residual, BATCHES)
    torch.testing.assert_close(residual.outputs(inputs), net.outputs(inputs), atol=SINGLE, rtol=0)
    assert method.report(residual)["start"]["taken_out_of_base"]
    assert not torch.equal(method.layers["first"].weight, net.first.weight)


@pytest.mark.parametrize("name", ["nlora", "inttune"])
def test_the_factors_are_blocks_of_the_weight_and_share_no_memory_with_it(name: str) -> None:
    model, net = Net(), Net()
    method = prepare(name, {"rank": 4}, model, BATCHES)
    before = {path: digest(layer.weight) for path, layer in method.layers.items()}
    for path, layer in method.layers.items():
        weight = getattr(net, path).weight
        assert torch.equal(layer.lora_A, weight[:4])
        assert torch.equal(layer.lora_R, weight[:4, :4])
        assert torch.equal(layer.lora_B, weight[:, :4])
        memory = layer.weight.untyped_storage().data_ptr()
        assert all(value.untyped_storage().data_ptr() != memory for _, value in layer.own_tensors())
    train(model, 3)
    assert {path: digest(layer.weight) for path, layer in method.layers.items()} == before
    assert not torch.equal(method.layers["first"].lora_R, net.first.weight[:4, :4])


def test_taking_the_start_out_leaves_the_memory_of_the_weight_alone() -> None:
    model = Net()
    weight = model.first.weight
    before = digest(weight)
    prepare("nlora", {"rank": 4, "residual": True}, model, BATCHES)
    train(model, 2)
    assert digest(weight) == before


def test_the_pseudo_inverse_gives_a_weight_of_rank_r_back_and_the_block_itself_does_not() -> None:
    drawn = torch.Generator().manual_seed(3)
    weight = torch.randn(24, 5, generator=drawn) @ torch.randn(5, 18, generator=drawn)
    inverse, plain = nystrom(weight, 5, inverse=True), nystrom(weight, 5)
    torch.testing.assert_close(inverse.B @ inverse.R @ inverse.A, weight, atol=1e-4, rtol=1e-4)
    assert float((plain.B @ plain.R @ plain.A - weight).norm() / weight.norm()) > 0.5


CASES: list[tuple[str, dict[str, Any], int]] = [
    ("slora", {"alpha": 6.0, "use_rslora": True}, 4),
    ("nlora", {}, 4),
    ("inttune", {"alpha": 8.0}, 4),
    ("inttune", {"residual": True, "alpha": 2.0}, 4),
    ("nlora", {"residual": True, "alpha": 2.0}, 8),
    ("nlora", {"residual": True, "alpha": 6.0, "use_rslora": True}, 8),
    ("nlora", {"initialisation": "nystrom_pinv", "alpha": 0.4}, 8),
]


@pytest.mark.parametrize(("name", "parameters", "rank"), CASES)
def test_the_export_gives_the_outputs_of_the_trained_layers(name: str, parameters: dict[str, Any], rank: int) -> None:
    model, folded, net = Net(), Net().requires_grad_(False), Net()
    method = prepare(name, {"rank": 4, **parameters}, model, BATCHES)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn_like(value))
    inputs = ROWS["inputs"]
    for path, layer in method.layers.items():
        found = method.factors(path, layer)
        assert found.rank == rank
        weight = getattr(folded, path).weight
        change = found.scaling * found.B @ found.A
        weight.add_(change)
        torch.testing.assert_close(weight - change, getattr(net, path).weight.detach(), atol=SINGLE, rtol=0)
    torch.testing.assert_close(folded.outputs(inputs), model.outputs(inputs).detach(), atol=SINGLE, rtol=0)
    assert not torch.allclose(folded.outputs(inputs), net.outputs(inputs).detach(), atol=1e-3)


def test_the_middle_matrix_is_counted_as_in_the_paper() -> None:
    """Llama-2-7B: 32 layers of 7 weights."""
    sides = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    for rank, millions in ((64, 0.918), (128, 3.67), (256, 14.68)):
        options = parse_parameters("inttune", {"rank": rank})
        assert 32 * sum(options.parameters_of(*side) for side in sides) / 1e6 == pytest.approx(millions, rel=1e-3)
    lora, more = parse_parameters("lora", {"rank": 128}), parse_parameters("nlora", {"rank": 128})
    counts = [32 * sum(options.parameters_of(*side) for side in sides) for options in (lora, more)]
    assert counts[0] == 319_815_680
    assert counts[1] - counts[0] == 224 * 128**2
    model = Net()
    prepare("inttune", {"rank": 4}, model, BATCHES)
    assert sum(value.numel() for value in model.parameters() if value.requires_grad) == 2 * 4 * 4


def test_inttune_moves_the_middle_alone_by_its_gradient() -> None:
    model = Net()
    method = prepare("inttune", {"rank": 4, "alpha": 6.0}, model, BATCHES)
    layer = method.layers["second"]
    first = {name: value.detach().clone() for name, value in layer.own_tensors()}
    kept: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].detach()))
    layer.register_full_backward_hook(lambda _module, _inputs, outputs: kept.append(outputs[0].detach()))
    model(**ROWS).loss.backward()
    g = kept[1].T @ kept[0]  # ∂L/∂W
    expected = 1.5 * layer.factors.B.T @ g @ layer.factors.A.T
    torch.testing.assert_close(layer.lora_R.grad, expected, atol=1e-6, rtol=0)
    before = delta(layer)
    model.zero_grad()
    train(model, 5)
    moved = {name for name, value in layer.own_tensors() if not torch.equal(value, first[name])}
    assert moved == {"lora_R"}
    singular = torch.linalg.svdvals((delta(layer) - before).double())
    assert float(singular[4:].max()) < 1e-6 * float(singular[0])


@pytest.mark.parametrize("name", FAMILY)
def test_dropout_falls_on_the_input_of_a_in_training_mode_alone(name: str) -> None:
    layer = prepare(name, {"rank": 4, "dropout": 0.5}, Net(), BATCHES).layers["first"]
    with torch.no_grad():
        layer.lora_B.fill_(0.3)
    x = torch.ones(400, 10)
    layer.eval()
    still = layer.adapter(x)
    torch.testing.assert_close(still[:1].expand_as(still), still)
    layer.train()
    dropped = layer.adapter(x)
    assert len(dropped.detach().unique(dim=0)) > 100
    torch.testing.assert_close(dropped.mean(0), still[0], atol=0.15, rtol=0)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("slora", {}), ("nlora", {}), ("nlora", {"residual": True}), ("inttune", {"residual": True})],
)
def test_going_on_has_the_same_base_and_factors(name: str, parameters: dict[str, Any], tmp_path: Path) -> None:
    model, again = Net(), Net()
    method = prepare(name, {"rank": 4, **parameters}, model, BATCHES)
    train(model, 2)
    method.save(model, tmp_path)
    resumed = prepare(name, {"rank": 4, **parameters}, again, BATCHES, seed=77, checkpoint=tmp_path)
    resumed.load(again, tmp_path)
    resumed.load_state(method.state())
    for (key, value), (other, same) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(value, same), key
    assert resumed.report(again) == method.report(model)


def test_a_conv1d_of_gpt2_is_adapted_by_its_turned_weight() -> None:
    net, turned = Net(), Net()
    turned.first = Conv1D(14, 10)  # type: ignore[assignment]
    with torch.no_grad():
        turned.first.weight.copy_(net.first.weight.T)
        turned.first.bias.copy_(net.first.bias)
    for name, parameters in (("nlora", {}), ("inttune", {"residual": True})):
        model, other = Net(), Net()
        other.first = turned.first
        method = prepare(name, {"rank": 4, **parameters}, model, BATCHES)
        same = prepare(name, {"rank": 4, **parameters}, other, BATCHES)
        torch.testing.assert_close(other.outputs(ROWS["inputs"]), model.outputs(ROWS["inputs"]))
        assert torch.equal(same.layers["first"].lora_A, method.layers["first"].lora_A)


def test_other_layers_than_linear_ones_are_refused() -> None:
    model = Net()
    model.aside = nn.Conv1d(3, 3, 1)  # type: ignore[assignment]
    with pytest.raises(RequestInvalid, match=r"aside is no linear layer in full precision \(Conv1d\)"):
        prepare("nlora", {"rank": 2}, model, BATCHES, targets=("aside",))


def test_two_exports_work_side_by_side_and_merge_and_unmerge(trainings: Any) -> None:
    """Stock PEFT holds both, switches between them, and has the weights back after a merge."""
    folders = [trainings.run("nlora", {"rank": 4}, steps=2, seed=seed)[1] for seed in (1, 2)]
    ids = torch.arange(1, 20)[None]
    with peft_deprecations_ignored(), torch.no_grad():
        alone = [
            PeftModel.from_pretrained(trainings.load_base(), str(folder))(input_ids=ids).logits for folder in folders
        ]
        both = PeftModel.from_pretrained(trainings.load_base(), str(folders[0]), adapter_name="one").eval()
        both.load_adapter(str(folders[1]), adapter_name="two")
        for name, expected in zip(("one", "two"), alone, strict=True):
            both.set_adapter(name)
            torch.testing.assert_close(both(input_ids=ids).logits, expected, atol=1e-4, rtol=0)
        assert not torch.allclose(alone[0], alone[1], atol=1e-3)
        weight = both.get_submodule("base_model.model.model.layers.0.mlp.up_proj").get_base_layer().weight
        before = weight.clone()
        both.merge_adapter()
        assert not torch.equal(weight, before)
        torch.testing.assert_close(both(input_ids=ids).logits, alone[1], atol=1e-4, rtol=0)
        both.unmerge_adapter()
        torch.testing.assert_close(weight, before, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "parameters", "pointer", "message"),
    [
        ("lora-sb", {"rank": 4, "alpha": 8.0}, "/parameters/alpha", "alpha can only be the rank, 4"),
        ("lora-sb", {"samples": 0}, "/parameters/samples", "greater than or equal to 1"),
        ("lora-sb", {"eta": float("nan")}, "/parameters/eta", "finite"),
        ("lora-sb", {"eta": 0.0}, "/parameters/eta", "greater than 0"),
        ("lora-sb", {"use_rslora": True}, "/parameters/use_rslora", "not permitted"),
        ("lora-xs", {"use_rslora": True}, "/parameters/use_rslora", "not permitted"),
        ("nlora", {"use_dora": True}, "/parameters/use_dora", "not permitted"),
        ("nlora", {"use_rslora": True}, "/parameters/residual", "needs residual"),
        ("inttune", {"use_rslora": True}, "/parameters/residual", "needs residual"),
        ("nlora", {"initialisation": "nystrom_pinv", "residual": False}, "/parameters/residual", "destroys the model"),
        ("slora", {"alpha": 0.0}, "/parameters/alpha", "greater than 0"),
        ("slora", {"dropout": 1.0}, "/parameters/dropout", "less than 1"),
        ("inttune", {"rank": 0}, "/parameters/rank", "greater than or equal to 1"),
    ],
)
def test_what_the_specification_forbids_is_refused(
    name: str, parameters: dict[str, Any], pointer: str, message: str
) -> None:
    with pytest.raises(RequestInvalid) as caught:
        parse_parameters(name, parameters)
    assert caught.value.errors[0].pointer == pointer
    assert message in caught.value.errors[0].message


def known(*targets: Target, **training: Any) -> Circumstances:
    return Circumstances(targets or (Target("q_proj", 64, 64),), TrainingSettings(**training), 10)


@pytest.mark.parametrize("name", [*FAMILY, "lora-sb", "lora-xs"])
def test_a_rank_above_a_side_is_refused_with_its_name(name: str) -> None:
    options = parse_parameters(name, {"rank": 9})
    with pytest.raises(RequestInvalid, match=r"Rank 9 is above 8, the smaller side of layers.0.k_proj \(8×64\)"):
        check_method(options, known(Target("q_proj", 64, 64), Target("layers.0.k_proj", 8, 64)))


def test_what_may_surprise_is_said() -> None:
    def warnings(name: str, parameters: dict[str, Any], **training: Any) -> str:
        return " ".join(parse_parameters(name, parameters).warnings(known(**training)))

    assert "about 5 % of every weight matrix" in warnings("nlora", {"rank": 128})
    assert "about 10 %" in warnings("inttune", {"rank": 256})
    assert not warnings("nlora", {"rank": 128, "residual": True})
    assert not warnings("nlora", {"rank": 32}) + warnings("slora", {"rank": 128}) + warnings("lora-xs", {})
    assert "estimated on 15 rows" in warnings("lora-sb", {"samples": 15})
    assert not warnings("lora-sb", {"samples": 16}) + warnings("lora-sb", {})
    assert "an experiment" in warnings("lora-sb", {"update": "raw"})
    assert "update: raw" in warnings("lora-sb", {}, optimizer="sgd")
    assert not warnings("lora-sb", {"update": "raw"}, optimizer="sgd")
