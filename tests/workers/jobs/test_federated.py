"""Federated trainings by the jobs' own functions, attempt after attempt in this process: policies, privacy, retries."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from tiny_base import sums, write_rows

from artifacts.content import file_sha256
from artifacts.manifest import FileEntry
from storage import adapters, claims, federations, jobs, remote_clients
from storage.blobs import BlobStore
from storage.job_metrics import metrics_after
from storage.tables import JobRow
from train.base_files import BaseFiles
from train.checkpoints import unpack
from train.data import DataFile
from train.federation.remote import train_round
from train.federation.run import Federation
from train.federation.state import TENSORS
from workers.attempt import AttemptSpec
from workers.context import Interruption
from workers.kinds import KINDS
from workers.runtime import run_attempt

CLIENTS = 3


class Hand:
    """Does what a supervisor does, one attempt at a time."""

    def __init__(self, pool: Any, tiny_base: Path, base_id: str, add_dataset: Callable[..., str]) -> None:
        self.pool, self.base, self.base_id = pool, tiny_base, base_id
        rows = sums(9)
        self.own, *self.clients = (add_dataset(rows[part :: CLIENTS + 1], f"part-{part}") for part in range(4))
        self.attempts = 0

    def submit(self, **parameters: Any) -> str:
        clients = [{"dataset": identifier} for identifier in self.clients]
        found: str = self.pool.submit(
            "train",
            method="ffa-lora",
            base_model=self.base_id,
            dataset=self.own,
            task="causal-lm",
            parameters={"rank": 4, "clients": clients, "rounds": 2, "local_steps": 2} | parameters,
            training={"learning_rate": 0.02, "batch_size": 8, "schedule": "constant"},
            evaluation={},
            seed=3,
            name=None,
        )
        return found

    def step(self, before: Callable[[claims.Claim], bool] = lambda _: True) -> bool:
        """One attempt, if one is due. `before` may see to it that it is not run."""
        with self.pool.database.write() as session:
            claim = claims.claim_next(session, server_id="srv", boot_id="boot", slot="cpu:0", lease_seconds=60.0)
        if claim is None:
            return False
        if not before(claim):
            return True
        self.attempts += 1
        settings = self.pool.settings()
        spec = AttemptSpec(
            job_id=claim.job_id,
            attempt=claim.attempt,
            kind=claim.kind,
            params=claim.params,
            slot="cpu:0",
            device="cpu",
            database_url=settings.database_url,
            blob_url=settings.blob_url,
            scratch=str(self.pool.folder / f"scratch-{self.attempts}"),
            cache=str(self.pool.folder / "cache"),
            model_roots=(str(self.base.parent),),
            function=KINDS[claim.kind],
        )
        outcome = run_attempt(spec, Interruption())
        if outcome.state == "failed":
            with self.pool.database.write() as session:
                claims.finish_failed(session, claim.job_id, claim.attempt, dict(outcome.error or {}))
        return True

    def run(self, job_id: str, before: Callable[[claims.Claim], bool] = lambda _: True) -> JobRow:
        while self.step(before) or self.settle():
            pass
        with self.pool.database.read() as session:
            return jobs.get_job(session, job_id)

    def settle(self) -> bool:
        """Whether that let anything go on."""
        with self.pool.database.read() as session:
            waiting = federations.unsettled(session)
        for run_id in waiting:
            with self.pool.database.write() as session:
                federations.settle(session, run_id)
        return bool(waiting)

    def lose(self, client: int) -> Callable[[claims.Claim], bool]:
        """Every job of this client fails."""

        def before(claim: claims.Claim) -> bool:
            if claim.params.get("client") != client:
                return True
            with self.pool.database.write() as session:
                error = {"code": "not_found", "detail": "the dataset is gone"}
                claims.finish_failed(session, claim.job_id, claim.attempt, error)
            return False

        return before

    def give(self, run: str, round_: int, client: int, rows: DataFile, folder: Path) -> None:
        """What a remote client does in a round, and what the service does with it."""
        blobs = BlobStore(self.pool.settings().blob_url)
        with self.pool.database.read() as session:
            params = jobs.get_job(session, run).params
            sha256 = remote_clients.start_of(session, run, round_ - 1).sha256
        start = unpack(blobs.materialize(sha256, folder / "cache"), folder / "start")
        told = {**params, "client": client, "round": round_}
        found = train_round(told, start / TENSORS, BaseFiles("tiny", str(self.base)), rows, folder)
        path = folder / "update.safetensors"
        save_file(dict(found.tensors), path)
        entry = FileEntry(path.name, file_sha256(path), path.stat().st_size, "application/octet-stream")
        details = {"rows": found.rows, "seconds": found.seconds, "loss": found.loss, "sha256": entry.sha256}
        blobs.put_file(path, entry.sha256)
        with self.pool.database.write() as session:
            remote_clients.give(session, run, round_ - 1, client, entry, details)

    def states(self, job_id: str) -> list[list[str]]:
        with self.pool.database.read() as session:
            rows = federations.rounds_after(session, job_id, 0, 100)
        return [[row.state for row in rows if row.round == number] for number in sorted({row.round for row in rows})]

    def series(self, job_id: str) -> list[dict[str, float]]:
        with self.pool.database.read() as session:
            return [dict(point.numbers) for point, _ in metrics_after(session, job_id, 0, 1000)]

    def digest(self, job: JobRow) -> str:
        assert job.result is not None
        with self.pool.database.read() as session:
            return adapters.get_adapter(session, job.result["adapters"][0]).weights_digest


@pytest.fixture
def hand(train_pool: Any, tiny_base: Path, base_id: str, add_dataset: Callable[..., str]) -> Hand:
    return Hand(train_pool, tiny_base, base_id, add_dataset)


def test_a_lost_client_is_left_out_or_ends_the_run_which_a_retry_takes_up(hand: Hand) -> None:
    skipped = hand.run(hand.submit(absent="skip", min_clients=2), hand.lose(1))
    assert skipped.error is None
    assert skipped.result is not None
    assert hand.states(skipped.id) == [["answered", "lost", "answered"]] * 2
    own = skipped.result["report"]["own"]
    assert own["absent"] == 2
    assert own["absences"][0] == {
        "round": 1,
        "client": 1,
        "state": "lost",
        "reason": "not_found: the dataset is gone",
    }
    assert [point["clients"] for point in hand.series(skipped.id)] == [2.0, 2.0]

    few = hand.run(hand.submit(absent="skip", min_clients=3), hand.lose(1))
    assert few.error is not None
    assert few.error["detail"].startswith("2 clients answered in round 1; min_clients is 3.")

    whole = hand.run(hand.submit())
    rounds = 0

    def second_round_fails(claim: claims.Claim) -> bool:
        nonlocal rounds
        rounds = max(rounds, claim.params.get("round", 0))
        return hand.lose(2)(claim) if rounds == 1 else True

    failed = hand.run(hand.submit(), second_round_fails)
    assert failed.error is not None
    assert "Client 2 was lost in round 2" in failed.error["detail"]
    with hand.pool.database.write() as session:
        retry = jobs.retry_job(session, failed.id).id
    again = hand.run(retry)
    assert again.error is None
    assert hand.states(retry) == [["answered"] * CLIENTS]  # the second round alone
    assert hand.digest(again) == hand.digest(whole)


def test_what_a_client_poisoned_is_in_no_average(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    update = Federation.update

    def poisoned(self: Federation, state: Any, client: int, *rest: Any) -> Any:
        found = update(self, state, client, *rest)
        if client == 0:
            next(iter(found.tensors.values())).view(-1)[0] = math.nan
        return found

    monkeypatch.setattr(Federation, "update", poisoned)
    job = hand.run(hand.submit(absent="skip", rounds=1))
    assert job.error is None
    assert job.result is not None
    assert hand.states(job.id) == [["refused", "answered", "answered"]]
    assert "numbers that are not finite" in job.result["report"]["own"]["absences"][0]["reason"]
    assert job.result["report"]["reload"]["largest_difference"] < 1e-4
    failed = hand.run(hand.submit(rounds=1))
    assert failed.error is not None
    assert failed.error["detail"].startswith("Client 0 was refused in round 1: ")


def test_a_remote_client_stands_beside_datasets_and_outlasts_whatever_dies(hand: Hand, tmp_path: Path) -> None:
    """A remote client gives what the job of its dataset would: the run ends with the same bytes. What it gave early is
    averaged although after that a client's process died, and the training's own before it could average."""
    whole = hand.run(hand.submit())
    rows = DataFile(write_rows(tmp_path / "rows.jsonl", sums(9)[3 :: CLIENTS + 1]), "jsonl")
    named = [{"dataset": identifier} for identifier in hand.clients[:2]]
    run = hand.submit(clients=[*named, {"remote": {"name": "site", "max_rows": 1000}}], max_update_norm=100.0)
    died = []

    def die_once(claim: claims.Claim) -> bool:
        """The jobs of client 0, and the training's attempt that would average, die once before they do a thing."""
        closing = claim.job_id == run and hand.states(run)[-1:] == [["answered"] * CLIENTS]
        if claim.job_id in died or not (closing or claim.params.get("client") == 0):
            return True
        died.append(claim.job_id)
        with hand.pool.database.write() as session:
            error = {"code": "lost", "detail": "killed"}
            claims.requeue(session, claim.job_id, claim.attempt, delay_seconds=0.0, error=error, exit=None)
        return False

    for round_ in (1, 2):
        while len(hand.states(run)) < round_:
            assert hand.step(die_once)
        hand.give(run, round_, 2, rows, tmp_path / f"given-{round_}")
        assert hand.states(run)[-1] == ["pending", "pending", "answered"]
    job = hand.run(run, die_once)
    assert job.error is None
    assert len(died) == 3
    assert hand.digest(job) == hand.digest(whole)
    data = [found.result["report"]["data"]["client_rows"] for found in (job, whole) if found.result is not None]
    assert data[0] == data[1]
    assert all(data[0])


@pytest.mark.slow
def test_a_private_run_stops_before_it_would_exceed_epsilon(hand: Hand) -> None:
    privacy = {"epsilon": 9.0, "delta": 1e-3, "noise_multiplier": 1.0}
    job = hand.run(hand.submit(rounds=50, local_steps=5, privacy=privacy))
    assert job.error is None
    assert job.result is not None
    own = job.result["report"]["own"]
    assert 1 <= own["rounds"] < 50
    assert own["privacy"]["epsilon"] <= 9.0
    assert own["privacy"]["private"] is True
    assert "privacy.epsilon allows 9" in own["stopped"]
    series = hand.series(job.id)
    spent = [point["epsilon"] for point in series]
    assert spent == sorted(spent)
    assert spent[-1] == own["privacy"]["epsilon"]
    assert all("loss" not in point for point in series)
    with hand.pool.database.read() as session:
        rows = federations.rounds_after(session, job.id, 0, 100)
    assert len(rows) == CLIENTS * own["rounds"]
    assert all(row.details["loss"] is None and row.details["epsilon"] <= 9.0 for row in rows)
