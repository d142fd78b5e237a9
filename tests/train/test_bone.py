"""Bone: the oracles of arXiv:2409.15371's algorithm in its four variants, exports, refusals."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from artifacts.adapter import Adapter
from artifacts.errors import BaseMismatch, FileBroken, FormatUnknown, ReloadMismatch, RequestInvalid
from artifacts.intake import inspect
from artifacts.shard_blocks import lora_factors
from train import declared
from train.bat_row import BatRowLinear
from train.catalog import METHODS, parse_parameters
from train.methods.bone import Bone, require_linear
from train.options.common import Circumstances, Target
from train.protocol import MethodContext
from train.settings import TrainingSettings

D_OUT, D_IN, R = 24, 32, 8
VARIANTS = ("default", "mini", "bat_col", "bat_row")
TOLERANCE = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")

Map = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """One linear layer with a bias."""

    def __init__(self, d_in: int = D_IN, d_out: int = D_OUT) -> None:
        super().__init__()
        self.name_or_path = "acme/net"
        with torch.random.fork_rng():
            torch.manual_seed(11)
            self.linear = nn.Linear(d_in, d_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bone(variant: str, net: nn.Module | None = None, rank: int = R, mini_r: int = 4) -> tuple[Any, nn.Module, Any]:
    """(method, prepared model, its trained tensor D)."""
    options = parse_parameters("bone", {"variant": variant, "rank": rank, "mini_r": mini_r})
    method = METHODS["bone"].load(options)
    context = MethodContext(["linear"], 10, lambda: iter(()), TrainingSettings(), task_type=None)
    model = method.prepare(net or Net(), context)
    [block] = [value for value in model.parameters() if value.requires_grad]
    return method, model, block


def filled(variant: str, **sizes: Any) -> tuple[Any, nn.Module, Any]:
    method, model, block = bone(variant, **sizes)
    with torch.no_grad():
        block.copy_(0.3 * draw(*block.shape, seed=5))
    return method, model, block


def delta_of(model: nn.Module, d_in: int = D_IN, d_out: int = D_OUT) -> Tensor:
    """ΔW of a model that is linear in x, from its outputs alone."""
    with torch.no_grad():
        eye = torch.eye(d_in)
        return (model(eye) - Net(d_in, d_out)(eye)).T


def lora(factors: tuple[Tensor, Tensor], net: nn.Module | None = None) -> tuple[nn.Module, Any]:
    """PEFT's LoRA with these factors and scaling 1."""
    A, B = factors
    made = get_peft_model(net or Net(), LoraConfig(r=len(A), lora_alpha=len(A), target_modules=["linear"]))
    layer = made.base_model.model.linear
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(A)
        layer.lora_B["default"].weight.copy_(B)
    return made, layer


@pytest.mark.parametrize("variant", VARIANTS)
def test_before_the_first_step_the_model_is_the_base_to_the_bit(variant: str) -> None:
    x = draw(3, 5, D_IN)
    assert torch.equal(bone(variant)[1](x), Net()(x))


@pytest.mark.parametrize("variant", ["default", "mini"])
def test_it_is_the_base_also_where_the_rank_does_not_divide_the_inputs(variant: str) -> None:
    x = draw(3, 20)
    assert torch.equal(bone(variant, Net(20))[1](x), Net(20)(x))


@pytest.mark.parametrize("d_in", [D_IN, 20])
def test_the_default_is_the_lora_with_a_frozen_e_in_outputs_and_gradients(d_in: int) -> None:
    _, model, block = filled("default", net=Net(d_in))
    A, B = lora_factors(block.detach(), D_OUT, d_in)
    assert all(A[i, j] == (i == j % R) for i in range(R) for j in range(d_in))
    twin, layer = lora((A, B), Net(d_in))
    x, upstream = draw(7, d_in), draw(7, D_OUT, seed=1)
    ours, theirs = model(x), twin(x)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
    (ours * upstream).sum().backward()
    (theirs * upstream).sum().backward()
    torch.testing.assert_close(block.grad, layer.lora_B["default"].weight.grad.T, atol=TOLERANCE, rtol=0)


def zero_sum_input() -> Tensor:
    z = draw(4, R)
    return torch.cat([z, -z, 2 * z, -2 * z], dim=1)


def test_inputs_whose_shards_sum_to_zero_are_not_seen_by_the_default_alone() -> None:
    x = zero_sum_input()
    base = Net()(x)
    for variant in ("default", "mini"):
        torch.testing.assert_close(filled(variant)[1](x), base, atol=TOLERANCE, rtol=0)
    for variant in ("bat_col", "bat_row"):
        assert float((filled(variant)[1](x) - base).detach().abs().max()) > 0.1
    # a LoRA of the same rank whose A is free sees them
    plain, _ = lora((draw(R, D_IN, seed=2), draw(D_OUT, R, seed=3)))
    assert float((plain(x) - base).detach().abs().max()) > 0.1


def test_the_columns_of_delta_repeat_and_its_rank_is_bounded() -> None:
    for variant, largest in (("default", R), ("mini", 4)):
        delta = delta_of(filled(variant)[1])
        torch.testing.assert_close(delta[:, R:], delta[:, :-R], atol=TOLERANCE, rtol=0)
        assert int(torch.linalg.matrix_rank(delta, atol=1e-4)) == largest
    for variant in ("bat_col", "bat_row"):
        delta = delta_of(filled(variant)[1])
        assert float((delta[:, R:] - delta[:, :-R]).abs().max()) > 0.1
        assert int(torch.linalg.matrix_rank(delta, atol=1e-4)) == D_OUT


def by_blocks(variant: str, W: Tensor, block: Tensor) -> Tensor:
    """ΔW by the definition, block by block."""
    delta = torch.zeros_like(W)
    for a in range(D_OUT // R):
        for c in range(D_IN // R):
            rows, columns = slice(a * R, (a + 1) * R), slice(c * R, (c + 1) * R)
            D = block[a if variant == "bat_col" else c]
            delta[rows, columns] = W[rows, columns] @ D + D
    return delta


@pytest.mark.parametrize("variant", ["bat_col", "bat_row"])
def test_bat_is_the_double_loop_over_blocks_in_outputs_weights_and_gradients(variant: str) -> None:
    _, model, block = filled(variant)
    W, bias = Net().linear.weight.detach(), Net().linear.bias.detach()
    reference = block.detach().clone().requires_grad_()
    x, upstream = draw(7, D_IN), draw(7, D_OUT, seed=1)
    expected = nn.functional.linear(x, W + by_blocks(variant, W, reference), bias)
    ours = model(x)
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)
    (ours * upstream).sum().backward()
    G = upstream.T @ x
    for index in range(len(block)):
        own = slice(index * R, (index + 1) * R)
        total = torch.zeros(R, R)
        for other in range((D_IN if variant == "bat_col" else D_OUT) // R):
            there = slice(other * R, (other + 1) * R)
            rows, columns = (own, there) if variant == "bat_col" else (there, own)
            total += (W[rows, columns] + torch.eye(R)).T @ G[rows, columns]
        torch.testing.assert_close(block.grad[index], total, atol=TOLERANCE, rtol=1e-5)


def test_bat_row_gives_the_same_delta_by_its_three_ways() -> None:
    _, model, block = filled("bat_row")
    layer: BatRowLinear = model.linear  # type: ignore[assignment]
    expected = by_blocks("bat_row", layer.weight, block.detach())
    torch.testing.assert_close(layer.delta(), expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(layer.adapter(torch.eye(D_IN)).T, expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(delta_of(model), expected, atol=TOLERANCE, rtol=0)


def test_bat_is_taken_out_of_the_weights_again_unless_a_block_is_minus_one() -> None:
    _, model, block = filled("bat_col")
    layer = model.base_model.model.linear
    W, x = Net().linear.weight.detach(), draw(7, D_IN)
    before = model(x)
    layer.merge()
    torch.testing.assert_close(model(x), before, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(layer.base_layer.weight, W + by_blocks("bat_col", W, block), atol=TOLERANCE, rtol=0)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, W, atol=1e-6, rtol=0)
    with torch.no_grad():
        block[0] = -torch.eye(R)
    layer.merge()
    with pytest.raises(RuntimeError, match="singular"):
        layer.unmerge()


@pytest.mark.parametrize("variant", ["default", "mini"])
def test_the_tile_forms_merge_and_unmerge(variant: str) -> None:
    _, model, _ = filled(variant)
    layer, x = model.base_model.model.linear, draw(7, D_IN)
    before = model(x)
    layer.merge()
    torch.testing.assert_close(model(x), before, atol=TOLERANCE, rtol=0)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, Net().linear.weight, atol=1e-6, rtol=0)


def test_folding_bat_row_gives_an_ordinary_model_of_the_same_function() -> None:
    _, model, _ = filled("bat_row")
    x = draw(7, D_IN)
    before = model(x).detach()
    folded = declared.fold(model)
    assert type(folded.linear) is nn.Linear
    torch.testing.assert_close(folded(x), before, atol=TOLERANCE, rtol=0)


def test_training_towards_any_delta_ends_at_the_mean_of_its_shards() -> None:
    """With isotropic inputs the loss is ‖ΔW − T‖²; what reaches 0 on a random T is a LoRA in disguise."""
    T = draw(D_OUT, 3, seed=2) @ draw(3, D_IN, seed=3)
    best = T.unflatten(1, (-1, R)).mean(1).T
    _, model, block = bone("default")
    eye, goal = torch.eye(D_IN), Net()(torch.eye(D_IN)).detach() + T.T
    optimizer = torch.optim.SGD([block], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        (model(eye) - goal).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(block.detach(), best, atol=TOLERANCE, rtol=0)
    left = float((T - delta_of(model)).norm() / T.norm())
    torch.testing.assert_close(left, float((T - best.T.repeat(1, D_IN // R)).norm() / T.norm()), atol=1e-5, rtol=0)
    assert left > 0.7
    # which a plain LoRA of the same rank is: T has rank 3
    plain, layer = lora((0.3 * draw(R, D_IN, seed=4), torch.zeros(D_OUT, R)))
    optimizer = torch.optim.Adam([layer.lora_A["default"].weight, layer.lora_B["default"].weight], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        (plain(eye) - goal).square().sum().backward()
        optimizer.step()
    assert float((T - delta_of(plain)).norm() / T.norm()) < 0.01


def test_the_mean_of_two_blocks_is_the_mean_of_their_deltas() -> None:
    blocks = [draw(R, D_OUT, seed=seed) for seed in (1, 2)]
    first, second = (B @ A for A, B in (lora_factors(block, D_OUT, D_IN) for block in blocks))
    A, B = lora_factors((blocks[0] + blocks[1]) / 2, D_OUT, D_IN)
    torch.testing.assert_close(B @ A, (first + second) / 2, atol=1e-6, rtol=0)


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


TARGETS = (Target("a.q_proj", 64, 64), Target("a.k_proj", 20, 64), Target("a.down_proj", 64, 48))


def problems(**parameters: Any) -> list[tuple[str, str]]:
    options = parse_parameters("bone", parameters)
    return [(item.pointer, item.message) for item in options.problems(Circumstances(TARGETS, TrainingSettings()))]


def test_every_module_that_the_rank_does_not_fit_is_named() -> None:
    found = problems(variant="bat_col", rank=16)
    assert [pointer for pointer, _ in found] == ["/parameters/rank"]
    assert "16 does not divide 20 of a.k_proj (20×64)" in found[0][1]
    assert len(problems(variant="bat_row", rank=32)) == 2
    assert problems(variant="bat_row", rank=4) == []
    assert problems(rank=7) == []
    assert problems(rank=48) == []  # above the outputs of k_proj, which the tile forms may be
    assert [text for _, text in problems(rank=50)] == ["rank 50 is above the 48 inputs of a.down_proj (64×48)"]
    found = problems(variant="mini", rank=4, mini_r=32)
    assert found == [("/parameters/mini_r", "mini_r 32 does not divide the 20 outputs of a.k_proj (20×64)")]
    assert problems(rank=4, mini_r=32) == []
    assert problems(variant="bat_row", rank=4, lossy_rank=21)[0][0] == "/parameters/lossy_rank"


@pytest.mark.parametrize(
    ("parameters", "pointer", "words"),
    [
        ({"variant": "bone"}, "/parameters/variant", "default"),
        ({"rank": 0}, "/parameters/rank", "greater than or equal to 1"),
        ({"mini_r": 0}, "/parameters/mini_r", "greater than or equal to 1"),
        ({"dropout": 1.0}, "/parameters/dropout", "less than 1"),
        ({"variant": "bat_col", "dropout": 0.1}, "/parameters/dropout", "would be ignored"),
        ({"variant": "bat_row", "dropout": 0.1}, "/parameters/dropout", "would be ignored"),
        ({"lossy_rank": 4}, "/parameters/lossy_rank", "nothing need be lost"),
        ({"alpha": 16}, "/parameters/alpha", "no alpha and no scaling"),
        ({"lora_alpha": 16}, "/parameters/lora_alpha", "no alpha and no scaling"),
        ({"use_rslora": True}, "/parameters/use_rslora", "no alpha and no scaling"),
        ({"init_weights": False}, "/parameters/init_weights", "starts at 0"),
        ({"colour": 1}, "/parameters/colour", "not permitted"),
    ],
)
def test_what_bone_does_not_have_is_refused_by_name(parameters: dict[str, Any], pointer: str, words: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        parse_parameters("bone", parameters)
    [finding] = caught.value.errors
    assert finding.pointer == pointer
    assert words in finding.message


def test_a_mini_of_width_one_and_an_idle_mini_r_are_warned_of() -> None:
    known = Circumstances(TARGETS, TrainingSettings())
    assert "rank 1" in parse_parameters("bone", {"variant": "mini", "mini_r": 1}).warnings(known)[0]
    assert "ignored" in parse_parameters("bone", {"mini_r": 4}).warnings(known)[0]
    assert parse_parameters("bone", {"variant": "mini", "mini_r": 4}).warnings(known) == []


def test_layers_that_are_not_linear_are_refused_by_name() -> None:
    from transformers.pytorch_utils import Conv1D

    net = nn.ModuleDict({"linear": nn.Linear(4, 4), "attn": Conv1D(8, 4), "embed": nn.Embedding(4, 4)})
    with pytest.raises(RequestInvalid, match="attn is a Conv1D; Bone adapts") as caught:
        require_linear(net, ["attn", "embed", "linear"])
    assert len(caught.value.errors) == 2


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


def test_the_menu_makes_the_method_that_the_variant_needs() -> None:
    assert type(METHODS["bone"].load(parse_parameters("bone", {}))) is Bone
