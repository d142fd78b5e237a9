"""FFA-LoRA in whole rounds on a tiny language model: the exact average, reports, budgets."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from federated_nets import SGD, clients_of
from safetensors import safe_open
from tiny_base import sums, write_rows
from torch import Tensor

from artifacts.adapter import Adapter
from artifacts.errors import RequestInvalid
from train.base_files import BaseFiles
from train.catalog import parse_parameters
from train.data import DataFile
from train.engine import Plan
from train.federation.averaging import average, shares
from train.federation.run import Federation, advanced, digest_of
from train.federation.state import ClientFacts, RunState
from train.settings import EvaluationSettings, TrainingSettings, parse_task


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
