"""Bone: the oracles of arXiv:2409.15371's algorithm in its four variants, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bone_nets import D_IN, D_OUT, TOLERANCE, VARIANTS, Net, R, bone, delta_of, draw, filled, lora
from torch import Tensor, nn

from artifacts.errors import RequestInvalid
from artifacts.shard_blocks import lora_factors
from train import declared
from train.bat_row import BatRowLinear
from train.catalog import METHODS, parse_parameters
from train.methods.bone import Bone, require_linear
from train.options.common import Circumstances, Target
from train.settings import TrainingSettings

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")


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


def test_the_menu_makes_the_method_that_the_variant_needs() -> None:
    assert type(METHODS["bone"].load(parse_parameters("bone", {}))) is Bone
