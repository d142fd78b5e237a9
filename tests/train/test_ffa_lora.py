"""FFA-LoRA: the exact average, the private step, the noise, the accountant, and what the server refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from small_nets import Net, regression_rows
from tiny_base import sums, write_rows
from torch import Tensor, nn

from artifacts.adapter import Adapter
from artifacts.errors import FileBroken, RequestInvalid
from artifacts.safetensors_header import read_header
from train.base_files import BaseFiles
from train.catalog import METHODS, parse_parameters
from train.data import DataFile
from train.engine import Plan
from train.federation.accounting import noise_for, spent
from train.federation.averaging import average, shares
from train.federation.local_steps import LocalPlan, Noise, seed_of, train_locally
from train.federation.run import Federation, advanced, digest_of, row_losses
from train.federation.state import ClientFacts, RunState
from train.federation.updates import check_update
from train.methods.peft_adapter import adapter_tensors
from train.options.common import Circumstances
from train.options.ffa_lora import FfaLoraOptions
from train.protocol import MethodContext
from train.settings import EvaluationSettings, TrainingSettings, parse_task

ROWS = regression_rows()
COUNT = len(ROWS["inputs"])
SGD = {"optimizer": "sgd", "schedule": "constant", "max_grad_norm": 0.0}


def clients_of(count: int) -> list[dict[str, str]]:
    return [{"dataset": f"dat_{number:032x}"} for number in range(count)]


# --- local steps, on a net of two layers ---


def toy(rank: int = 4, **parameters: Any) -> nn.Module:
    """The net with FFA-LoRA; lora_A from seed 5."""
    return adapted(Net(), {"rank": rank, **parameters})


def adapted(net: Any, parameters: dict[str, Any]) -> nn.Module:
    net.name_or_path = "toy"
    method = METHODS["ffa-lora"].load(parse_parameters("ffa-lora", parameters))
    context = MethodContext(
        targets=["first", "second"],
        total_steps=1,
        batches=lambda: iter(()),
        settings=TrainingSettings(),
        task_type=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return method.prepare(net, context)


def losses(model: nn.Module, rows: Sequence[int]) -> Tensor:
    """(rows,) mean squared differences."""
    chosen = list(rows)
    outputs = model(ROWS["inputs"][chosen], ROWS["labels"][chosen]).outputs
    found: Tensor = (outputs - ROWS["labels"][chosen]).square().mean(dim=1)
    return found


def local_plan(steps: int = 1, noise: Noise | None = None, **changes: Any) -> LocalPlan:
    settings = {"learning_rate": 0.5, "batch_size": COUNT, **SGD} | changes
    rows_at_once = settings.pop("rows_at_once", 7)
    return LocalPlan(TrainingSettings(**settings), steps, 0, steps, 3, rows_at_once, noise)


def factors(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.named_parameters() if ".lora_" in name}


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


# --- whole rounds, on a tiny language model ---


class Runs:
    """Federated runs of the tiny base model in this process; the last part is the server's."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, BaseFiles("acme/tiny", str(base))
        rows = sums(8)
        self.files = [self._file(f"part-{part}", rows[part::4]) for part in range(4)]
        self.pooled = self._file("pooled", [row for part in range(3) for row in rows[part::4]])

    def _file(self, name: str, rows: list[dict[str, Any]]) -> DataFile:
        return DataFile(write_rows(self.folder / f"{name}.jsonl", rows), "jsonl")

    def federation(self, parameters: dict[str, Any] | None = None, **training: Any) -> Federation:
        chosen = {"rank": 4, "clients": clients_of(3), "rounds": 2, "local_steps": 3} | (parameters or {})
        settings = {"learning_rate": 0.02, "batch_size": 8, "schedule": "constant"} | training
        plan = Plan(
            method="ffa-lora",
            options=parse_parameters("ffa-lora", chosen),
            task=parse_task("causal-lm"),
            training=TrainingSettings(**settings),
            evaluation=EvaluationSettings(),
            seed=3,
            device="cpu",
        )
        return Federation(plan, self.base, self.folder)

    def round(self, federation: Federation, state: RunState) -> tuple[RunState, dict[int, Any]]:
        updates = {client: federation.update(state, client, self.files[client]) for client in range(3)}
        weights = shares({client: update.rows for client, update in updates.items()}, "rows")
        return advanced(state, average({c: u.tensors for c, u in updates.items()}, weights)), updates


@pytest.fixture
def runs(tmp_path: Path, trainings: Any) -> Runs:
    return Runs(tmp_path, trainings.base)


def products(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """B·A of every layer, in double precision."""
    return {
        name: tensors[name.replace("lora_A", "lora_B")].double() @ value.double()
        for name, value in tensors.items()
        if ".lora_A." in name
    }


def error_of_the_average(runs: Runs, federation: Federation) -> float:
    """‖mean(B)·mean(A) − mean(B·A)‖ / ‖mean(B·A)‖ after a round, over all layers."""
    state = federation.begin(runs.files[3], runs.files[:3])
    after, updates = runs.round(federation, state)
    wanted: dict[str, Tensor] = {}
    weights = shares({client: update.rows for client, update in updates.items()}, "rows")
    for client, update in updates.items():
        for name, value in products({**state.tensors, **update.tensors}).items():
            wanted[name] = wanted.get(name, torch.zeros_like(value)) + weights[client] * value
    found = products(dict(after.tensors))
    off = sum(float((found[name] - value).square().sum()) for name, value in wanted.items())
    return math.sqrt(off / sum(float(value.square().sum()) for value in wanted.values()))


def test_the_average_is_exact_where_lora_a_is_frozen_and_only_there(runs: Runs) -> None:
    assert error_of_the_average(runs, runs.federation({"local_steps": 8})) < 1e-6
    assert error_of_the_average(runs, runs.federation({"local_steps": 8, "freeze_a": False})) > 0.01


def test_rounds_of_one_full_step_are_steps_on_the_pooled_rows(runs: Runs) -> None:
    """E = 1, full batches, no noise, no clip: T rounds are T steps of centralised SGD."""
    rounds, size = 4, 16
    settings = {**SGD, "learning_rate": 0.5}
    federation = runs.federation({"rounds": rounds, "local_steps": 1}, batch_size=size, **settings)
    state = start = federation.begin(runs.files[3], runs.files[:3])
    assert [client.rows for client in state.clients] == [size] * 3
    for _ in range(rounds):
        state, _ = runs.round(federation, state)
    central = runs.federation({"rounds": 1, "local_steps": rounds}, batch_size=3 * size, **settings)
    update = central.update(start, 0, runs.pooled)
    assert max(float(value.abs().max()) for value in update.tensors.values()) > 0.01
    for name, value in update.tensors.items():
        torch.testing.assert_close(state.tensors[name], value, rtol=1e-4, atol=1e-5)


def test_a_run_from_its_seed_to_its_file(runs: Runs, tmp_path: Path) -> None:
    federation = runs.federation({"rank": 4, "alpha": 8.0})
    state = federation.begin(runs.files[3], runs.files[:3])
    drawn = digest_of(state.tensors)
    for _ in range(2):
        state.save(tmp_path / f"kept-{state.round}")
        state = RunState.load(tmp_path / f"kept-{state.round}")
        state, updates = runs.round(federation, state)
        for update in updates.values():
            assert not any(".lora_A." in name for name in update.tensors)
            sent = sum(value.numel() * value.element_size() for value in update.tensors.values())
            assert sent == sum(value.shape[0] * 4 * 4 for name, value in state.tensors.items() if ".lora_B." in name)
    report = federation.finish(state, runs.files[3], tmp_path / "adapter")
    assert report.evaluation["after"]["loss"] < report.evaluation["before"]["loss"]
    assert report.reload["largest_difference"] <= report.reload["tolerance"] < report.reload["effect"]
    # lora_A is what the seed gives, on the server, on every client and in the file.
    assert digest_of(runs.federation().begin(runs.files[3], runs.files[:3]).tensors) == drawn
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        told = json.loads(file.metadata()["ffa_lora"])
        assert digest_of({name: file.get_tensor(name) for name in file.keys()}) == drawn  # noqa: SIM118
    assert (told["lora_A_sha256"], told["rounds"], told["clients"]) == (drawn, 2, 3)
    assert {factor.scaling for factor in Adapter.open(tmp_path / "adapter").values()} == {2.0}


@pytest.mark.slow
def test_the_report_of_a_private_run_says_what_was_spent_on_what(runs: Runs, tmp_path: Path) -> None:
    privacy = {"epsilon": 8.0, "delta": 1e-3, "noise_seed": 1}
    federation = runs.federation({"privacy": privacy, "rounds": 1})
    start = federation.begin(runs.files[3], runs.files[:3])
    state, updates = runs.round(federation, start)
    assert all(update.loss is None for update in updates.values())
    state = state.with_private_steps({0: 3, 1: 3, 2: 3})
    report = federation.finish(state, runs.files[3], tmp_path / "adapter")
    told = report.own["privacy"]
    assert 7.5 < told["epsilon"] <= 8.0
    assert told["unit"].startswith("one row of one client's dataset")
    assert told["private"] is False
    assert any("NOT private" in text for text in report.warnings)
    assert [client["steps"] for client in told["clients"]] == [3, 3, 3]
    repeated = federation.update(start, 1, runs.files[1])
    assert all(torch.equal(value, updates[1].tensors[name]) for name, value in repeated.tensors.items())


def test_a_budget_without_room_for_one_round_is_refused(runs: Runs) -> None:
    federation = runs.federation({"privacy": {"epsilon": 0.1, "delta": 1e-3, "noise_multiplier": 0.5}})
    with pytest.raises(RequestInvalid, match="Not one round") as caught:
        federation.begin(runs.files[3], runs.files[:3])
    assert caught.value.errors[0].pointer == "/parameters/privacy/noise_multiplier"


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


def test_a_remote_client_with_too_few_rows_or_too_many_is_refused_before_it_trains(runs: Runs) -> None:
    clients = [{"remote": {"name": "a", "max_rows": 10}}, {"remote": {"name": "b"}}]
    federation = runs.federation({"clients": clients}, batch_size=8)
    count = len(federation._read(runs.files[0]).train)
    assert count > 10
    state = RunState({}, (ClientFacts(0), ClientFacts(0)))
    with pytest.raises(RequestInvalid, match="max_rows of this client is 10") as caught:
        federation.update(state, 0, runs.files[0])
    assert caught.value.errors[0].pointer == "/parameters/clients/0/remote"
    large = runs.federation({"clients": clients}, batch_size=count + 1)
    with pytest.raises(RequestInvalid, match=r"fewer than training\.batch_size"):
        large.update(state, 1, runs.files[0])


def test_a_training_with_clients_is_not_done_without_a_service(trainings: Any) -> None:
    with pytest.raises(RequestInvalid, match="pool of a service"):
        trainings.run("ffa-lora", {"rank": 4, "clients": clients_of(2)}, steps=2)


def test_alpha_is_the_rank_unless_it_is_given() -> None:
    assert FfaLoraOptions(rank=6).numerator == 6.0
    assert FfaLoraOptions(rank=6, alpha=3.0).numerator == 3.0
    assert METHODS["ffa-lora"].options.model_fields["rank"].default == 8
    assert len(adapter_tensors(toy())) == 4
