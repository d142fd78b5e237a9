"""The estimate of the first full update: what it leaves as it was, what it refuses, how it keeps to its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small_nets import Net, in_batches, prepare, regression_rows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from artifacts.errors import RequestInvalid, TrainingDiverged
from train.full_gradients import FullGradient, full_gradients, grouped, pick_rows, shared_weights

ROWS = regression_rows()
PATHS = ("first", "second")
SINGLES = [{name: value[number : number + 1] for name, value in ROWS.items()} for number in range(24)]


def estimate(model: nn.Module, *, memory_bytes: int = 10**9, rows: Any = SINGLES, **more: Any) -> list[FullGradient]:
    return list(full_gradients(model, PATHS, rows, memory_bytes=memory_bytes, seed=4, **more))


def test_passes_keep_to_the_memory_and_give_the_same_bits_under_dropout() -> None:
    model = Net(dropout=0.5)
    one, several = estimate(model), estimate(model, memory_bytes=1)
    assert [found.paths for found in one] == [found.paths for found in several] == [("first",), ("second",)]
    for first, second in zip(one, several, strict=True):
        assert torch.equal(first.total, second.total)
    without = estimate(Net())
    assert not torch.equal(one[1].total, without[1].total)


def test_groups_are_as_large_as_the_memory_allows() -> None:
    weights = shared_weights(Net(), ["aside", "first", "second"])  # 90, 140 and 126 numbers
    sizes = [[weight.numel() for weight, _ in group] for group in grouped(weights, 4 * 266)]
    assert sizes == [[90, 140], [126]]
    assert [len(group) for group in grouped(weights, 4 * 356)] == [3]
    assert [len(group) for group in grouped(weights, 1)] == [1, 1, 1]


def test_never_more_gradients_than_one_beside_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every gradient is moved away before the next one is there."""
    model = Net()
    held: list[int] = []
    weights = [model.first.weight, model.second.weight]
    zeros = torch.zeros

    def counting(*size: Any, **more: Any) -> Tensor:
        held.append(sum(weight.grad is not None for weight in weights))
        return zeros(*size, **more)

    monkeypatch.setattr(torch, "zeros", counting)
    estimate(model)
    assert held == [0, 0]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_model_and_the_random_numbers_are_as_before() -> None:
    model = Net(dropout=0.5)
    model.first.eval()
    model.second.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    for _ in full_gradients(model, PATHS, SINGLES, memory_bytes=1, seed=4):
        assert [module.training for module in model.modules()] == modes
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in model.parameters())
    with pytest.raises(RequestInvalid):
        prepare("lora-sb", {"rank": 4}, model, in_batches(ROWS), targets=("aside",))
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_preparing_draws_from_no_one_elses_generator() -> None:
    random = torch.get_rng_state()

    def drawing() -> Iterator[Mapping[str, Tensor]]:
        for batch in in_batches(ROWS)():
            yield {**batch, "inputs": batch["inputs"] + torch.randn(len(batch["inputs"]), 10)}

    for name in ("lora-sb", "lora-xs", "slora", "nlora", "inttune"):
        prepare(name, {"rank": 4}, Net(dropout=0.3), drawing)
        assert torch.equal(torch.get_rng_state(), random), name


def test_the_same_seed_gives_the_same_start_and_another_one_other_rows() -> None:
    starts = [
        prepare("lora-sb", {"rank": 4, "samples": 8}, Net(), in_batches(ROWS), seed=seed).layers["first"].factors
        for seed in (1, 1, 2)
    ]
    assert torch.equal(starts[0].B, starts[1].B)
    assert not torch.equal(starts[0].B, starts[2].B)


def test_the_loss_is_the_tasks() -> None:
    def tripled(model: nn.Module, row: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = 3 * model(**row).loss
        return loss

    for plain, found in zip(estimate(Net()), estimate(Net(), loss=tripled), strict=True):
        torch.testing.assert_close(found.total, 3 * plain.total)


def test_a_layer_that_the_loss_does_not_use_is_named() -> None:
    with pytest.raises(RequestInvalid, match="The loss does not depend on aside") as caught:
        prepare("lora-sb", {"rank": 4}, Net(), in_batches(ROWS), targets=("aside", "first"))
    assert caught.value.errors[0].pointer == "/parameters/target_modules"


def test_a_gradient_of_zero_is_refused() -> None:
    model = Net()
    with torch.no_grad():
        model.second.weight.zero_()
    with pytest.raises(RequestInvalid, match="The gradient of first is 0 on all samples"):
        prepare("lora-sb", {"rank": 4}, model, in_batches(ROWS))


def test_a_quantised_base_is_refused() -> None:
    model = Net()
    model.first.weight = nn.Parameter(torch.zeros(14, 10, dtype=torch.int8), requires_grad=False)
    for name in ("lora-sb", "lora-xs", "nlora"):
        with pytest.raises(RequestInvalid, match=r"first is (quantised|no linear layer in full precision)"):
            prepare(name, {"rank": 4}, model, in_batches(ROWS))


def test_a_loss_that_is_no_number_is_told() -> None:
    with pytest.raises(TrainingDiverged, match="The loss before the first step is nan"):
        prepare("lora-sb", {"rank": 4}, Net(), in_batches({**ROWS, "labels": ROWS["labels"] * float("nan")}))


def test_more_samples_than_rows_are_refused() -> None:
    with pytest.raises(RequestInvalid, match="25 samples were asked for, and there are 24 training rows") as caught:
        prepare("lora-sb", {"rank": 4, "samples": 25}, Net(), in_batches(ROWS))
    assert caught.value.errors[0].pointer == "/parameters/samples"


@pytest.mark.parametrize(("rows", "samples"), [(10, 10), (24, 16), (20_000, 20)])
def test_unset_a_thousandth_of_the_rows_are_taken_and_at_least_sixteen(rows: int, samples: int) -> None:
    numbers = torch.arange(rows)

    def batches() -> Iterator[Mapping[str, Tensor]]:
        for start in range(0, rows, 1000):
            yield {"inputs": numbers[start : start + 1000]}

    found = [int(row["inputs"]) for row in pick_rows(batches, None, seed=0)]
    assert len(found) == samples == len(set(found))
    if rows == 20_000:  # drawn from everywhere, not from the beginning
        assert max(found) > 10_000


class Twice(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor, labels: Tensor) -> Any:
        loss = (self.second(torch.tanh(self.first(inputs))) - labels).square().mean()
        return type("Found", (), {"loss": loss})


def test_a_shared_weight_is_estimated_once_with_both_uses() -> None:
    drawn = torch.Generator().manual_seed(2)
    rows = {name: torch.randn(6, 8, generator=drawn) for name in ("inputs", "labels")}
    singles = [{name: value[number : number + 1] for name, value in rows.items()} for number in range(6)]
    model = Twice()
    found = estimate(model, rows=singles)
    assert [item.paths for item in found] == [PATHS]
    model.zero_grad()
    (6 * model(**rows).loss).backward()
    torch.testing.assert_close(found[0].total, model.first.weight.grad)


def test_a_conv1d_of_gpt2_has_its_gradient_turned() -> None:
    net, turned = Net(), Net()
    turned.first = Conv1D(14, 10)  # type: ignore[assignment]
    with torch.no_grad():
        turned.first.weight.copy_(net.first.weight.T)
        turned.first.bias.copy_(net.first.bias)
    expected, found = estimate(net), estimate(turned)
    torch.testing.assert_close(found[0].total, expected[0].total)
    method = prepare("lora-sb", {"rank": 4, "samples": 24}, turned, in_batches(ROWS))
    same = prepare("lora-sb", {"rank": 4, "samples": 24}, net, in_batches(ROWS))
    torch.testing.assert_close(turned.outputs(ROWS["inputs"]), net.outputs(ROWS["inputs"]))
    assert method.layers["first"].factors.A.shape == same.layers["first"].factors.A.shape == (4, 10)


def in_half(factor: float) -> list[FullGradient]:
    """Of a loss that is multiplied, in float16."""
    rows = [{name: value.half() for name, value in row.items()} | {"factor": factor} for row in SINGLES]
    return estimate(Net().half(), rows=rows)


@pytest.mark.parametrize("factor", [2e-6, 3.0])
def test_in_float16_the_loss_is_scaled_up_and_down_again_if_that_was_too_much(factor: float) -> None:
    for wanted, found in zip(estimate(Net()), in_half(factor), strict=True):
        assert float((found.total / factor - wanted.total).norm() / wanted.total.norm()) < 0.02


def test_without_scales_small_gradients_would_vanish_and_with_one_alone_large_ones_overflow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("train.full_gradients._SCALES", {torch.float16: (1.0,)})
    wanted, found = estimate(Net())[0].total, in_half(2e-6)[0].total
    assert float((found / 2e-6 - wanted).norm() / wanted.norm()) > 0.05
    monkeypatch.setattr("train.full_gradients._SCALES", {torch.float16: (2.0**16,)})
    with pytest.raises(TrainingDiverged, match="A gradient before the first step is NaN or infinite"):
        in_half(3.0)


@pytest.fixture(scope="module")
def language_rows() -> Callable[[], Iterator[Mapping[str, Tensor]]]:
    ids = torch.randint(1, 200, (4, 12), generator=torch.Generator().manual_seed(0))
    return lambda: iter([{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}])


def test_recomputed_activations_give_the_same_gradient(tiny_base: Path, language_rows: Any) -> None:
    paths = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj"]
    totals = []
    for wanted in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
        rows = pick_rows(language_rows, 4, 0)
        found = full_gradients(model, paths, rows, memory_bytes=10**9, seed=0, checkpointing=wanted)
        totals.append([item.total for item in found])
        assert not model.is_activation_checkpointing
    for plain, recomputed in zip(*totals, strict=True):
        torch.testing.assert_close(plain, recomputed)
