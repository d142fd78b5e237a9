"""What the methods with an r×r matrix are for: a regression with a known answer, and the first layers of SmolLM2."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_lm import IGNORED, SmallLanguageModel
from small_nets import in_batches, prepare
from torch import Tensor, nn

from train.methods.three_factor import ThreeFactorLinear

pytestmark = pytest.mark.slow

SEEDS = (0, 10, 20)


def drawn(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


class Line(nn.Module):
    """y = W x."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.line = nn.Linear(40, 48, bias=False)
        self.line.weight.data.copy_(weight)

    def forward(self, inputs: Tensor, labels: Tensor) -> Any:
        return SimpleNamespace(loss=(self.line(inputs) - labels).square().mean())


class Shifted:
    """256 rows of y = (W + Δ) x, Δ of rank 3."""

    def __init__(self, seed: int) -> None:
        self.weight = drawn(48, 40, seed) / 40**0.5
        self.shift = 0.3 * drawn(48, 3, seed + 1) @ drawn(3, 40, seed + 2)
        inputs = drawn(256, 40, seed + 3)
        self.rows = {"inputs": inputs, "labels": inputs @ (self.weight + self.shift).T}
        self.base = float((inputs @ self.shift.T).square().mean())

    def layer(self, name: str = "lora-sb", **parameters: Any) -> ThreeFactorLinear:
        parameters = {"rank": 6, **({"samples": 256} if name == "lora-sb" else {}), **parameters}
        method = prepare(name, parameters, Line(self.weight), in_batches(self.rows, 32), targets=("line",))
        layer: ThreeFactorLinear = method.layers["line"]
        return layer

    def trained(self, layer: ThreeFactorLinear) -> float:
        """The loss that is left when R is trained, as a share of that of the base."""
        optimizer = torch.optim.Adam([layer.lora_R], lr=0.05)
        for _ in range(400):
            optimizer.zero_grad()
            loss = (layer(self.rows["inputs"]) - self.rows["labels"]).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return float(loss.detach()) / self.base

    def captured(self, layer: ThreeFactorLinear) -> float:
        """The share of the norm of Δ inside the subspace."""
        factors = layer.factors
        return float((factors.B.T @ self.shift @ factors.A.T).norm() / self.shift.norm())


def with_random_bases(layer: ThreeFactorLinear) -> ThreeFactorLinear:
    with torch.no_grad():
        layer.lora_B.copy_(torch.linalg.qr(drawn(48, 6, 77)).Q)
        layer.lora_A.copy_(torch.linalg.qr(drawn(40, 6, 78)).Q.T)
    return layer


@pytest.mark.parametrize("seed", SEEDS)
def test_b1_the_estimated_subspace_holds_the_shift_and_those_of_the_weight_and_of_chance_do_not(seed: int) -> None:
    task = Shifted(seed)
    assert task.trained(task.layer()) <= 0.35
    assert task.trained(task.layer(update="raw")) <= 0.15
    assert task.trained(task.layer("lora-xs")) > 0.9
    assert task.trained(with_random_bases(task.layer())) > 0.9


def test_b2_more_samples_hold_more_of_the_shift() -> None:
    tasks = [Shifted(seed) for seed in SEEDS]
    means = [
        sum(task.captured(task.layer(samples=samples)) for task in tasks) / len(tasks)
        for samples in (1, 4, 16, 64, 256)
    ]
    assert means == sorted(means)
    assert means[0] < 0.3
    assert means[-1] > 0.75


@pytest.mark.parametrize("seed", SEEDS)
def test_b4_where_the_middle_begins_hardly_matters_and_the_bases_do(seed: int) -> None:
    task = Shifted(seed)
    usual, zeroed = task.layer(eta=1e-3), task.layer(eta=1e-3)
    with torch.no_grad():
        zeroed.lora_R.zero_()
    expected = task.trained(usual)
    assert task.trained(zeroed) == pytest.approx(expected, rel=0.02)
    assert task.trained(with_random_bases(task.layer(eta=1e-3))) > 2 * expected


@pytest.fixture(scope="module")
def words() -> SmallLanguageModel:
    return SmallLanguageModel.load("orders")


def held_out(model: SmallLanguageModel, name: str, rank: int, rate: float, steps: int = 24, **more: Any) -> float:
    return model.train(name, {"rank": rank}, steps=steps, learning_rate=rate, **more)[1]


def test_b3_lora_sb_learns_as_well_as_lora_xs_and_worse_from_an_estimate_on_shuffled_labels(
    words: SmallLanguageModel,
) -> None:
    """Each at the better of two rates: the factors of LoRA-XS hold the singular values, which speeds its R up."""
    rates = (1e-2, 3e-2)
    generator = torch.Generator().manual_seed(0)
    wrong = []
    for batch in words.batches:
        labels = batch["labels"].clone()
        counted = labels != IGNORED
        labels[counted] = labels[counted][torch.randperm(int(counted.sum()), generator=generator)]
        wrong.append({**batch, "labels": labels})
    right = [held_out(words, "lora-sb", 16, rate) for rate in rates]
    shuffled = [held_out(words, "lora-sb", 16, rate, estimate=wrong) for rate in rates]
    assert min(right) <= min(held_out(words, "lora-xs", 16, rate) for rate in rates)
    assert all(good < bad for good, bad in zip(right, shuffled, strict=True))


def test_b5_the_start_is_a_small_step_from_the_base_model(words: SmallLanguageModel) -> None:
    base = words.loss(words.model)
    start = words.train("lora-sb", {"rank": 16}, steps=0, learning_rate=1e-2)[0]
    assert start < base
    assert start == pytest.approx(base, rel=0.01)


def test_nlora_learns_faster_than_lora_at_the_same_rate(words: SmallLanguageModel) -> None:
    """The loss on the rows that are trained on; a seed is LoRA's A and the order of the batches."""
    wins, gaps = 0, []
    for seed in range(5):
        common: dict[str, Any] = {"steps": 50, "learning_rate": 1e-3, "seed": seed, "shuffled": True}
        nlora = words.train("nlora", {"rank": 8}, **common)
        lora = words.train("lora", {"rank": 8, "alpha": 8.0}, **common)
        gaps.append([words.training_loss(trained.model) for trained in (nlora, lora)])
        wins += gaps[-1][0] < gaps[-1][1]
    assert wins >= 4, gaps


def test_a_fixed_middle_matrix_is_what_makes_the_difference(words: SmallLanguageModel) -> None:
    """The control: NLoRA with R frozen learns less."""

    def freeze(method: Any) -> None:
        for layer in method.layers.values():
            layer.lora_R.requires_grad_(False)

    assert held_out(words, "nlora", 8, 1e-3) < held_out(words, "nlora", 8, 1e-3, change=freeze)


def with_random_outer_factors(method: Any) -> None:
    """A and B of the same norms that have nothing to do with W."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in method.layers.values():
            for factor in (layer.lora_A, layer.lora_B):
                other = torch.randn(factor.shape, generator=generator)
                factor.copy_(other * factor.norm() / other.norm())


def test_inttune_gains_more_than_half_of_what_lora_gains(words: SmallLanguageModel) -> None:
    """With a fiftieth of its parameters at most. So does the control: here it is not the blocks of W that tell."""
    base = words.loss(words.model)
    common: dict[str, Any] = {"steps": 24, "learning_rate": 1e-2}
    lora = words.train("lora", {"rank": 8, "alpha": 8.0}, **common)
    inttune = words.train("inttune", {"rank": 8}, **common)
    counts = [
        sum(value.numel() for value in trained.model.parameters() if value.requires_grad) for trained in (inttune, lora)
    ]
    assert counts[0] <= 0.02 * counts[1]
    gain = base - inttune.after
    assert gain > (base - lora.after) / 2
    control = base - held_out(words, "inttune", 8, 1e-2, change=with_random_outer_factors)
    assert control == pytest.approx(gain, abs=0.2 * (base - lora.after))
