"""FFA-LoRA: the private step, the noise, the accountant, the average, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from federated_nets import COUNT, ROWS, adapted, clients_of, factors, local_plan, losses, toy
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import save_file
from small_nets import Net
from torch import Tensor, nn

from artifacts.errors import FileBroken
from artifacts.safetensors_header import read_header
from train.catalog import METHODS, parse_parameters
from train.federation.accounting import noise_for, spent
from train.federation.averaging import shares
from train.federation.local_steps import Noise, seed_of, train_locally
from train.federation.run import row_losses
from train.federation.state import ClientFacts, RunState
from train.federation.updates import check_update
from train.methods.peft_adapter import adapter_tensors
from train.options.common import Circumstances
from train.options.ffa_lora import FfaLoraOptions
from train.settings import TrainingSettings


def test_only_lora_b_is_trained_and_the_base_is_what_it_was_at_first() -> None:
    plain, net = Net(), toy()
    torch.testing.assert_close(net(**ROWS).outputs, plain(**ROWS).outputs, rtol=0, atol=0)
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    train_locally(net, range(COUNT), losses, local_plan(3))
    moved = {name for name, value in net.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".lora_B." in name}


def test_alpha_is_no_hyper_parameter_but_for_the_clip() -> None:
    """α·c with η/c² gives the same ΔW; where every gradient is clipped, η/c does (powers of two: to the bit)."""

    def delta(alpha: float, rate: float, clip: float | None) -> Tensor:
        net: Any = toy(alpha=alpha)
        noise = None if clip is None else Noise(0.0, clip, 1.0, seed=1)
        train_locally(net, range(COUNT), losses, local_plan(10, noise, learning_rate=rate))
        found: Tensor = net.first.scaling["default"] * net.first.lora_B["default"].weight.detach()
        return found

    plain = delta(4.0, 0.25, None)
    assert float(plain.abs().max()) > 0.01
    torch.testing.assert_close(delta(8.0, 0.25 / 4, None), plain, rtol=1e-5, atol=1e-7)
    clipped = delta(4.0, 0.25, 1e-6)
    torch.testing.assert_close(delta(8.0, 0.25 / 2, 1e-6), clipped, rtol=1e-4, atol=1e-10)
    assert not torch.allclose(delta(8.0, 0.25 / 4, 1e-6), clipped, rtol=0.1, atol=0)


@pytest.mark.parametrize("rows_at_once", [5, COUNT])
def test_a_private_step_without_noise_is_the_mean_of_the_clipped_gradients_of_the_rows(rows_at_once: int) -> None:
    by_hand, net = toy(), toy()
    trained = [value for value in by_hand.parameters() if value.requires_grad]
    of_rows = [torch.autograd.grad(losses(by_hand, [row]).sum(), trained) for row in range(COUNT)]
    norms = [math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients)) for gradients in of_rows]
    clip = sorted(norms)[COUNT // 2]  # half of the rows are clipped, half are not
    total = [torch.zeros_like(value) for value in trained]
    for gradients, norm in zip(of_rows, norms, strict=True):
        for place, gradient in zip(total, gradients, strict=True):
            place += gradient * min(1.0, clip / norm)
    noise = Noise(0.0, clip, 1.0, seed=1)
    train_locally(net, range(COUNT), losses, local_plan(1, noise, learning_rate=0.5, rows_at_once=rows_at_once))
    found = [value for value in net.parameters() if value.requires_grad]
    for place, value in zip(total, found, strict=True):
        torch.testing.assert_close(value.detach(), -0.5 * place / COUNT, rtol=1e-4, atol=1e-9)


class Wide(nn.Module):
    """One layer with 16 thousand entries in lora_B of rank 8."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 2000), nn.Linear(2000, 9)

    def forward(self, inputs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(outputs=self.second(self.first(inputs)))


def noisy(seed: int | None) -> Tensor:
    """lora_B after one step whose gradients are 0."""
    net: Any = adapted(Wide(), {"rank": 8})

    def nothing(model: nn.Module, rows: Sequence[int]) -> Tensor:
        return model(torch.ones(len(rows), 8)).outputs.sum(dim=1) * 0.0

    noise = Noise(1.5, 2.0, 8 / COUNT, seed)
    train_locally(net, range(COUNT), nothing, local_plan(1, noise, learning_rate=0.25, batch_size=8))
    found: Tensor = net.first.lora_B["default"].weight.detach().clone()
    return found


def test_the_noise_has_the_size_that_is_paid_for_and_no_seed_of_its_own() -> None:
    one, other, again, fixed = noisy(None), noisy(None), noisy(7), noisy(7)
    for value in (one, fixed):
        assert float(value.std()) == pytest.approx(0.25 * 1.5 * 2.0 / 8, rel=0.05)
        assert abs(float(value.mean())) < 0.01
    assert not torch.equal(one, other)
    assert torch.equal(again, fixed)


def test_a_step_in_which_no_row_was_drawn_is_noise_alone() -> None:
    net = toy()
    noise = Noise(1.0, 2.0, 1e-12, seed=1)
    train_locally(net, range(COUNT), losses, local_plan(2, noise, learning_rate=0.25, batch_size=8))
    moved = torch.cat([value.flatten() for name, value in factors(net).items() if ".lora_B." in name])
    assert float(moved.std()) == pytest.approx(math.sqrt(2) * 0.25 * 2.0 / 8, rel=0.3)


def test_every_client_round_and_use_has_a_seed_of_its_own() -> None:
    seeds = {
        seed_of(seed, round_, client, use)
        for seed in (0, 1)
        for round_ in range(12)
        for client in range(12)
        for use in ("rows", "noise")
    }
    assert len(seeds) == 2 * 12 * 12 * 2
    assert all(0 <= seed < 2**63 for seed in seeds)


# --- the accountant ---


def test_the_noise_is_the_least_that_keeps_within_epsilon() -> None:
    """The figure of the literature's setting, by the Rényi accountant: σ = 0.548."""
    rate, steps = 200 / 130_000, 10_000
    noise = noise_for(6.0, 1e-5, rate, steps)
    assert noise == pytest.approx(0.548, abs=0.002)
    assert 5.9 < spent(noise, 1e-5, rate, steps) <= 6.0


def test_epsilon_grows_with_the_steps() -> None:
    found = [spent(1.1, 1e-5, 0.01, steps) for steps in (0, 1, 10, 100, 1000)]
    assert found[0] == 0.0
    assert found == sorted(found)
    assert len(set(found)) == len(found)


def test_a_run_with_a_noise_of_its_own_stops_before_the_round_that_would_exceed_epsilon() -> None:
    chosen = {"epsilon": 4.0, "delta": 1e-3, "noise_multiplier": 1.0}
    options = parse_parameters("ffa-lora", {"clients": clients_of(2), "local_steps": 5, "privacy": chosen})
    assert isinstance(options, FfaLoraOptions)
    state = RunState({}, (ClientFacts(100, 1.0, 0.08), ClientFacts(50, 1.0, 0.16)))
    rounds = 0
    while state.budget_problem(options) is None:
        state = state.with_private_steps({0: 5, 1: 5})
        rounds += 1
        assert state.epsilon(1e-3) <= 4.0
    assert rounds >= 1
    assert state.epsilon(1e-3, 5) > 4.0
    assert state.epsilon(1e-3) == state.clients[1].epsilon(1e-3) > state.clients[0].epsilon(1e-3)


# --- the server's arithmetic ---


@given(rows=st.lists(st.integers(1, 10**6), min_size=1, max_size=8))
def test_shares_sum_to_one_and_go_by_the_rows(rows: list[int]) -> None:
    found = shares(dict(enumerate(rows)), "rows")
    assert sum(found.values()) == pytest.approx(1.0)
    assert all(found[number] == pytest.approx(count / sum(rows)) for number, count in enumerate(rows))
    assert set(shares(dict(enumerate(rows)), "equal").values()) == {1 / len(rows)}


def test_what_can_not_be_averaged_is_refused_by_name(tmp_path: Path) -> None:
    before = {
        "x.lora_A.weight": torch.ones(2, 3),
        "x.lora_B.weight": torch.zeros(3, 2),
        "y.lora_B.weight": torch.ones(2, 2),
    }
    save_file(before, tmp_path / "start.safetensors")
    good = {name: value + 1.0 for name, value in before.items() if ".lora_B." in name}

    def check(update: dict[str, Tensor], max_norm: float | None = None) -> float:
        start = tmp_path / "start.safetensors"
        trained = {name: info for name, info in read_header(start).tensors.items() if ".lora_B." in name}
        save_file(update, tmp_path / "update.safetensors")
        return check_update(tmp_path / "update.safetensors", start, trained, max_norm)

    assert check(good) == pytest.approx(math.sqrt(10))
    assert check(good, max_norm=3.2) == pytest.approx(math.sqrt(10))
    for value in (math.nan, math.inf):
        poisoned = good["x.lora_B.weight"].clone()
        poisoned[1, 1] = value
        with pytest.raises(FileBroken, match=r"x\.lora_B\.weight has numbers that are not finite, .* at \[1, 1\]"):
            check({**good, "x.lora_B.weight": poisoned})
    with pytest.raises(FileBroken, match="farther than max_update_norm, 3"):
        check(good, max_norm=3.0)
    with pytest.raises(FileBroken, match=r"y\.lora_B\.weight is missing"):
        check({"x.lora_B.weight": good["x.lora_B.weight"]})
    with pytest.raises(FileBroken, match="/file/z is not asked for"):
        check({**good, "z": torch.zeros(1)})
    with pytest.raises(FileBroken, match=r"has the shape \[4\], not \[2, 2\]"):
        check({**good, "y.lora_B.weight": torch.zeros(4)})
    with pytest.raises(FileBroken, match="is BF16, not F32"):
        check({**good, "y.lora_B.weight": torch.zeros(2, 2, dtype=torch.bfloat16)})


def test_the_loss_of_a_row_is_its_own() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, -100, 3, -100, -100], [-100] * 5])
    expected = nn.functional.cross_entropy(logits[0, [0, 2]], torch.tensor([1, 3]))
    torch.testing.assert_close(row_losses(logits, labels), torch.stack([expected, torch.tensor(0.0)]))


# --- options ---


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"privacy": {"epsilon": 1}}, "privacy needs clients"),
        ({"freeze_a": False}, "is the method lora"),
        ({"clients": clients_of(1)}, "a single client"),
        ({"clients": clients_of(1) * 2}, "names a dataset twice"),
        ({"clients": clients_of(2), "min_clients": 3}, "min_clients is 3"),
        ({"clients": clients_of(2), "privacy": {"epsilon": 0}}, "greater than 0"),
        ({"clients": clients_of(2), "privacy": {"epsilon": 1, "delta": 1}}, "less than 1"),
        ({"clients": clients_of(2), "privacy": {"epsilon": 1, "clip_norm": 0}}, "greater than 0"),
        ({"clients": clients_of(2), "rounds": 0}, "greater than or equal to 1"),
        ({"clients": clients_of(2), "local_steps": 0}, "greater than or equal to 1"),
        ({"clients": [{"dataset": "x"}, {"dataset": "y"}]}, "match pattern"),
    ],
)
def test_options_that_mean_nothing_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FfaLoraOptions.model_validate(parameters)


def test_settings_of_the_loop_that_a_client_has_not_are_refused_by_their_names() -> None:
    odd = {
        "steps": 4,
        "gradient_accumulation": 2,
        "precision": "bfloat16",
        "gradient_checkpointing": True,
        "early_stopping": {},
    }
    options = FfaLoraOptions.model_validate({"clients": clients_of(2)})
    known = Circumstances((), TrainingSettings(**odd), packed=True)
    pointers = {problem.pointer for problem in options.problems(known)}
    assert pointers == {f"/training/{name}" for name in odd} | {"/task/packing"}
    assert FfaLoraOptions().problems(known) == []


def test_a_client_with_too_few_rows_for_a_batch_or_too_many_for_delta_is_refused() -> None:
    chosen = {"clients": clients_of(2), "privacy": {"epsilon": 1, "delta": 1e-2}}
    options = FfaLoraOptions.model_validate(chosen)
    assert options.row_problems(50, 8, "/x", 0) == []
    assert [item.pointer for item in options.row_problems(7, 8, "/x", 0)] == ["/x"]
    assert [item.pointer for item in options.row_problems(100, 8, "/x", 0)] == ["/parameters/privacy/delta"]


def test_alpha_is_the_rank_unless_it_is_given() -> None:
    assert FfaLoraOptions(rank=6).numerator == 6.0
    assert FfaLoraOptions(rank=6, alpha=3.0).numerator == 3.0
    assert METHODS["ffa-lora"].options.model_fields["rank"].default == 8
    assert len(adapter_tensors(toy())) == 4
