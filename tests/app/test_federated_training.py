"""Federated trainings over HTTP: rounds of children of their own, clients that give nothing, privacy, and kills."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))

from tiny_base import sums, write_tiny_base

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
CLIENTS = 3
TRAINING = {"learning_rate": 0.02, "batch_size": 8, "schedule": "constant"}


@pytest.fixture
def federation(serve: Any, tmp_path: Path) -> Federation:
    base = write_tiny_base(tmp_path / "roots" / "tiny")
    server = serve(pool="local", devices="cpu:2", max_wait_seconds=60, model_roots=(base.parent,))
    return Federation(server, base)


class Federation:
    """A server with a base model, the server's rows, and three clients' rows."""

    def __init__(self, server: Any, base: Path) -> None:
        self.client = server.client
        model = self.client.post("/models", json={"path": str(base), "name": "base"}, timeout=120)
        assert model.status_code == 201, model.text
        self.model = model.json()["id"]
        self.own, *self.clients = (self.dataset(f"part {part}", sums(9)[part :: CLIENTS + 1]) for part in range(4))

    def dataset(self, name: str, rows: list[dict[str, Any]]) -> str:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        answer = self.client.post("/datasets", files=[("file", (f"{name}.jsonl", text.encode()))])
        assert answer.status_code == 201, answer.text
        found: str = answer.json()["id"]
        return found

    def body(self, parameters: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        clients = [{"dataset": identifier} for identifier in self.clients]
        chosen = {"rank": 4, "clients": clients, "rounds": 2, "local_steps": 4} | (parameters or {})
        return {
            "method": "ffa-lora",
            "base_model": self.model,
            "dataset": self.own,
            "parameters": chosen,
            "training": TRAINING,
            "seed": 3,
        } | changes

    def submit(self, parameters: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        answer = self.client.post("/train", json=self.body(parameters, **changes))
        assert answer.status_code == 202, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get(f"/jobs/{job_id}").json()
        return found

    def ended(self, job: dict[str, Any], seconds: float = 200) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while job["finished_at"] is None and time.monotonic() < deadline:
            job = self.client.get(f"/jobs/{job['id']}", headers={"Prefer": "wait=30"}, timeout=60).json()
        return job

    def rounds(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.client.get(f"/jobs/{job['id']}/rounds").json()["items"]
        return found

    def attempts(self, job_id: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.client.get(f"/jobs/{job_id}/attempts").json()["items"]
        return found

    def until(self, condition: Callable[[], Any], what: str, seconds: float = 150) -> Any:
        deadline, pause = time.monotonic() + seconds, threading.Event()
        while not (found := condition()):
            assert time.monotonic() < deadline, what
            pause.wait(0.05)
        return found

    def child(self, job: dict[str, Any], round_: int, client: int) -> str | None:
        """The job of a client in a round, once it was asked."""
        rounds = self.rounds(job)
        found: str | None = rounds[round_]["clients"][client]["job_id"] if len(rounds) > round_ else None
        return found

    def kill(self, job_id: str) -> str:
        """SIGKILL to the process of the first attempt that runs."""

        def pid() -> int | None:
            attempts = self.attempts(job_id)
            running = [item["pid"] for item in attempts if item["finished_at"] is None and item["pid"] is not None]
            return running[-1] if running else None

        os.kill(self.until(pid, f"an attempt at {job_id}"), signal.SIGKILL)
        return job_id

    def digests(self, job: dict[str, Any]) -> list[str]:
        (adapter,) = job["result"]["adapters"]
        return [entry["sha256"] for entry in self.client.get(f"/adapters/{adapter}").json()["files"]]


def test_a_federated_training_over_http(federation: Federation) -> None:
    job = federation.ended(federation.submit())
    assert job["state"] == "succeeded", job["error"]
    report = job["result"]["report"]
    assert report["evaluation"]["after"]["loss"] < report["evaluation"]["before"]["loss"] - 0.3
    assert report["reload"]["largest_difference"] <= 1e-4 < report["reload"]["effect"]
    rounds = federation.rounds(job)
    assert [[client["state"] for client in item["clients"]] for item in rounds] == [["answered"] * CLIENTS] * 2


def test_a_killed_run_ends_with_the_bytes_of_one_that_was_left_alone(federation: Federation) -> None:
    """Two clients are killed in the middle of their steps, and the server's part once: all by SIGKILL."""
    privacy = {"epsilon": 50.0, "delta": 1e-3, "noise_multiplier": 1.0, "noise_seed": 1}
    chosen = {"local_steps": 12, "privacy": privacy}
    whole = federation.ended(federation.submit(chosen, name="whole"))
    assert whole["state"] == "succeeded", whole["error"]

    job = federation.submit(chosen, name="killed")
    killed = []
    for number in (0, 1):
        child = federation.until(lambda number=number: federation.child(job, number, 0), "a client")
        killed.append(federation.kill(child))
    federation.kill(job["id"])  # whichever of its attempts comes next
    job = federation.ended(job)
    assert job["state"] == "succeeded", job["error"]
    assert federation.digests(job) == federation.digests(whole)
    assert job["result"]["adapters"] == whole["result"]["adapters"]
    outcomes = [item["outcome"] for item in federation.attempts(job["id"])]
    assert "lost" in outcomes
    assert all(federation.attempts(child)[0]["outcome"] == "lost" for child in killed)
    reports = [item["result"]["report"] for item in (whole, job)]
    assert reports[0]["own"] == reports[1]["own"]
    assert reports[0]["evaluation"] == reports[1]["evaluation"]
