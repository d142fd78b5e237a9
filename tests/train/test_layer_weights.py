"""The weights of layers: their sum, their gradient, the rules of choice; and which layer a path lies in."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from artifacts.errors import TrainingDiverged
from train.batches import Batches, EndlessRows
from train.bilevel import Loss, hypergradient
from train.layer_groups import group_of, grouped_by_layer
from train.layer_weights import Choice, LayerWeights, choose

numbers = st.lists(st.floats(-5, 5, allow_subnormal=False), min_size=2, max_size=40)


def weights_at(a: list[float]) -> LayerWeights:
    made = LayerWeights(len(a), 0.01)
    with torch.no_grad():
        made.a.copy_(torch.tensor(a, dtype=torch.float64))
    return made


@given(a=numbers, shift=st.floats(-20, 20), seed=st.integers(0, 99))
def test_the_weights_sum_to_the_number_of_layers_and_their_gradient_to_nothing(
    a: list[float], shift: float, seed: int
) -> None:
    made, moved = weights_at(a), weights_at([value + shift for value in a])
    assert float(made.weights.sum().detach()) == pytest.approx(len(a))
    torch.testing.assert_close(made.weights, moved.weights)
    gradient = made.gradient(torch.randn(len(a), generator=torch.Generator().manual_seed(seed)))
    assert float(gradient.sum().abs()) <= 1e-6 * float(gradient.abs().sum())
    assert float(gradient.abs().sum()) > 0


@given(a=numbers)
def test_the_gradient_is_that_of_the_softmax(a: list[float]) -> None:
    """∂L/∂a_i = w_i·(g_i − Σ_j w_j g_j / N)."""
    made = weights_at(a)
    g, w = torch.arange(len(a), dtype=torch.float64).cos(), made.weights.detach()
    torch.testing.assert_close(made.gradient(g), w * (g - (w * g).sum() / len(a)))


def test_adam_takes_its_first_step_by_the_sign_and_goes_on_to_the_bit_from_its_state() -> None:
    made = LayerWeights(3, 0.01)
    made.step(torch.tensor([3.0, -1.0, 0.1]))
    assert made.a.tolist() == pytest.approx([-0.01, 0.01, 0.01], rel=1e-6)
    taken_up = LayerWeights(3, 0.01)
    taken_up.load_state(json.loads(json.dumps(made.state())))
    for weights in (made, taken_up):
        weights.step(torch.tensor([0.5, 2.0, -0.3]))
        weights.step(torch.tensor([0.1, 0.0, 0.2]))
    assert torch.equal(made.a, taken_up.a)
    assert made.entropy() < math.log(3)
    fresh = LayerWeights(3, 0.01)
    fresh.load_state(json.loads(json.dumps(LayerWeights(3, 0.01).state())))
    assert fresh.a.tolist() == [0.0, 0.0, 0.0]
    assert fresh.entropy() == pytest.approx(math.log(3))


def test_a_gradient_that_is_not_finite_ends_the_training() -> None:
    with pytest.raises(TrainingDiverged, match="NaN or infinite"):
        LayerWeights(2, 0.01).step(torch.tensor([math.nan, 1.0]))


@given(a=numbers, shift=st.floats(-3, 3))
def test_above_the_mean_is_a_weight_above_one_whatever_is_added(a: list[float], shift: float) -> None:
    weights = weights_at(a).weights.tolist()
    if min(abs(weight - 1) for weight in weights) < 1e-6:
        return
    expected = tuple(layer for layer, weight in enumerate(weights) if weight > 1)
    assert choose(a, "above_mean").layers == expected
    assert choose([value + shift for value in a], "above_mean").layers == expected


def test_the_three_rules() -> None:
    a = [0.2, -0.1, 0.05, -0.4]
    assert choose(a, "positive") == Choice((0, 2), "positive")
    assert choose(a, "top_k", 3).layers == (0, 1, 2)
    assert choose([0.1, 0.3, 0.3], "top_k", 1).layers == (1,)
    assert choose([0.1, 0.2, 0.3], "positive").layers == (0, 1, 2)


def test_without_a_positive_one_the_mean_decides_and_says_so() -> None:
    found = choose([-0.3, -0.1, -0.2], "positive")
    assert (found.layers, found.rule) == ((1,), "above_mean")


@pytest.mark.parametrize("rule", ["positive", "above_mean"])
def test_layers_that_are_all_alike_can_not_be_chosen_from(rule: str) -> None:
    with pytest.raises(TrainingDiverged, match="the same weight"):
        choose([-0.1, -0.1, -0.1], rule)


LAYERS, SIDE = 4, 6
IN_UNET = "down_blocks.0.attentions.1.transformer_blocks.0"


def problem(seed: int = 0) -> tuple[list[Tensor], list[Loss], list[Loss]]:
    """A float64 tower with a low-rank change in each layer: factors, three training losses, two validation losses."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = [drawn(SIDE, SIDE) / SIDE**0.5 for _ in range(LAYERS)]
    theta = [factor for _ in range(LAYERS) for factor in (drawn(2, SIDE) * 0.4, drawn(SIDE, 2) * 0.4)]

    def loss_on(x: Tensor, y: Tensor) -> Loss:
        def loss(factors: list[Tensor], w: Tensor) -> Tensor:
            h = x
            for layer in range(LAYERS):
                a, b = factors[2 * layer], factors[2 * layer + 1]
                h = h + torch.tanh(h @ base[layer].T + w[layer] * (h @ a.T) @ b.T)
            return (h - y).square().mean()

        return loss  # type: ignore[return-value]

    losses = [loss_on(drawn(8, SIDE), drawn(8, SIDE)) for _ in range(5)]
    return theta, losses[:3], losses[3:]


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_gradient_through_the_steps_equals_central_differences(steps: int) -> None:
    theta, training, validation = problem()
    w, rate = torch.linspace(0.5, 1.5, LAYERS, dtype=torch.float64), 0.05

    def value(at: Tensor) -> float:
        current = [factor.clone().requires_grad_() for factor in theta]
        for loss in training[:steps]:
            found = torch.autograd.grad(loss(current, at), current)
            current = [
                (here - rate * step).detach().requires_grad_() for here, step in zip(current, found, strict=True)
            ]
        return sum(float(loss(current, at).detach()) for loss in validation) / len(validation)

    numeric = torch.zeros(LAYERS, dtype=torch.float64)
    for layer in range(LAYERS):
        apart = torch.zeros(LAYERS, dtype=torch.float64)
        apart[layer] = 1e-5
        numeric[layer] = (value(w + apart) - value(w - apart)) / 2e-5
    found = hypergradient(w, theta, training[:steps], validation, rate)
    assert float((found.weights - numeric).norm() / numeric.norm()) < 1e-6
    assert found.loss == pytest.approx(value(w))
    assert all(factor.grad is None for factor in theta)
    if steps:
        direct = hypergradient(w, theta, [], validation).weights
        assert float((found.weights - direct).norm()) > 1e-3 * float(direct.norm())


def test_without_steps_it_is_the_gradient_with_the_parameters_held_and_a_scale_changes_nothing() -> None:
    theta, _, validation = problem()
    w = torch.ones(LAYERS, dtype=torch.float64, requires_grad=True)
    mean = torch.stack([loss(theta, w) for loss in validation]).mean()
    (expected,) = torch.autograd.grad(mean, w)
    torch.testing.assert_close(hypergradient(w, theta, [], validation).weights, expected)
    torch.testing.assert_close(hypergradient(w, theta, [], validation, scale=1024.0).weights, expected)


@pytest.mark.parametrize(
    ("path", "group"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.3"),
        ("model.layers.11.mlp.experts.5.w1", "model.layers.11"),
        ("bert.encoder.layer.7.attention.self.query", "bert.encoder.layer.7"),
        ("transformer.h.0.attn.c_attn", "transformer.h.0"),
        ("encoder.block.1.layer.0.SelfAttention.q", "encoder.block.1"),
        ("decoder.block.1.layer.0.SelfAttention.q", "decoder.block.1"),
        (f"{IN_UNET}.attn1.to_out.0", IN_UNET),
        (f"{IN_UNET}.ff.net.2", IN_UNET),
        ("mid_block.resnets.0.time_emb_proj", "mid_block.resnets.0"),
        ("bert.pooler.dense", None),
        ("lm_head", None),
        ("head.0", None),
    ],
)
def test_the_layer_of_a_path(path: str, group: str | None) -> None:
    assert group_of(path) == group


def test_layers_come_in_the_order_of_their_numbers_and_1_is_not_11() -> None:
    paths = [f"layers.{number}.{name}" for number in (11, 1, 2) for name in ("v", "q")]
    found = grouped_by_layer(paths)
    assert list(found) == ["layers.1", "layers.2", "layers.11"]
    assert found["layers.1"] == ["layers.1.q", "layers.1.v"]
    with pytest.raises(ValueError, match="pooler"):
        grouped_by_layer(["pooler"])


@given(rows=st.integers(3, 50), size=st.integers(1, 9), ranks=st.integers(1, 3), data=st.data())
def test_rows_that_are_withheld_come_only_after_that(rows: int, size: int, ranks: int, data: st.DataObject) -> None:
    withheld = frozenset(data.draw(st.sets(st.integers(0, rows - 1), min_size=1, max_size=rows - 1)))
    plain = Batches(rows, size, 7)
    until = (data.draw(st.integers(0, 2)), data.draw(st.integers(0, len(plain))))
    shares = [Batches(rows, size, 7, rank, ranks, withheld=withheld, until=until) for rank in range(ranks)]
    for epoch in range(4):
        for batches in (plain, *shares):
            batches.epoch = epoch
        found = [[row for part in parts for row in part] for parts in zip(*map(list, shares), strict=True)]
        for number, (batch, usual) in enumerate(zip(found, plain, strict=True)):
            if (epoch, number) < until:
                assert len(batch) == len(usual)
                assert not withheld.intersection(batch)
            else:
                assert batch == usual


@given(count=st.integers(1, 20), first=st.integers(0, 60), seed=st.integers(0, 5))
def test_rows_without_an_end_come_all_in_every_round(count: int, first: int, seed: int) -> None:
    chosen = [number * 3 for number in range(count)]
    rows = EndlessRows(chosen, seed)
    for start in (0, 2 * count):
        assert sorted(rows.take(start, count)) == chosen
    together = rows.take(first, 7)
    assert together == [row for at in range(first, first + 7) for row in EndlessRows(chosen, seed).take(at, 1)]
