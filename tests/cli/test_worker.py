"""`rankwise worker`: works off the jobs of a server that has no pool of its own, and stops when it is told to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.server_process import ServerProcess

ROOT = Path(__file__).resolve().parents[2]
STOP_SECONDS = 60


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def test_a_worker_beside_a_server_without_a_pool(
    cli: Callable[..., Any],
    adapters: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free_port: int,
) -> None:
    data = tmp_path / "data"
    with ServerProcess(data, {"POOL": "off"}, tmp_path / "server.log") as server:
        monkeypatch.setenv("RANKWISE_SERVER", server.url)
        ids = [item["id"] for item in cli("adapters", "add", *adapters, "--json").json]
        job = cli("merge", *ids, "--method", "cat", "--no-wait", "--json").json
        assert job["state"] == "queued"
        environment = {
            **os.environ,
            "RANKWISE_DATA_DIR": str(tmp_path / "worker"),
            "RANKWISE_DATABASE_URL": f"sqlite:///{data / 'rankwise.db'}",
            "RANKWISE_BLOB_URL": (data / "blobs").as_uri(),
            "RANKWISE_DEVICES": "cpu:1",
            "RANKWISE_METRICS_PORT": str(free_port),
        }
        with (tmp_path / "worker.log").open("wb") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "worker"], cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        try:
            done = cli("jobs", "watch", job["id"], "--json")
            with urllib.request.urlopen(f"http://127.0.0.1:{free_port}/metrics", timeout=30) as answer:
                metrics = answer.read().decode()
            worker.send_signal(signal.SIGTERM)
            code = worker.wait(STOP_SECONDS)
        finally:
            worker.kill()
            worker.wait()
    assert done.code == 0, (tmp_path / "worker.log").read_text(encoding="utf-8")
    assert done.json["state"] == "succeeded"
    assert code == 0, (tmp_path / "worker.log").read_text(encoding="utf-8")
    assert 'rankwise_job_wait_seconds_count{kind="merge"} 1.0' in metrics
    assert "rankwise_servers 1.0" in metrics


def test_two_workers_of_one_folder(tmp_path: Path) -> None:
    """The second would take the first one's jobs for lost, so it does not start."""
    from workers.identity import ServerLock, read_server_id

    environment = {**os.environ, "RANKWISE_DATA_DIR": str(tmp_path), "RANKWISE_DEVICES": "cpu:1"}
    lock = ServerLock(tmp_path, read_server_id(tmp_path))
    lock.acquire()
    try:
        command = [sys.executable, "-m", "app.cli", "worker"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    finally:
        lock.release()
    assert done.returncode == 1
    assert "state_conflict" in done.stderr
