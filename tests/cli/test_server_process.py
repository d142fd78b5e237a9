"""The service as a child process: it starts, says why it does not, and leaves nothing behind."""

from __future__ import annotations

import json
import socket
import urllib.request
from pathlib import Path

import psutil
import pytest

from app.server_process import ServerError, ServerProcess


def test_it_serves_and_ends_with_all_its_children(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data", {"DEVICES": "cpu:1"}, tmp_path / "server.log") as server:
        with urllib.request.urlopen(f"{server.url}/readyz", timeout=10) as answer:
            assert answer.status == 200
        # Its own family: this process may be the parent of others, such as a cluster that other tests use.
        service = psutil.Process(server.pid)
        family = [service, *service.children(recursive=True)]
        assert len(family) > 1
        port = int(server.url.rpartition(":")[2])
    assert not [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    lines = (tmp_path / "server.log").read_text(encoding="utf-8").splitlines()
    assert "server_started" in {json.loads(line)["event"] for line in lines if line.startswith("{")}


def test_a_failed_start_shows_the_end_of_the_log(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "data", {"PORT": "1", "LEASE_SECONDS": "1"}, tmp_path / "server.log")
    with pytest.raises(ServerError, match="exit code 1") as caught, server:
        pytest.fail("it started with settings that contradict each other")
    assert "beat_seconds" in caught.value.problem["hint"]


def test_the_callers_settings_do_not_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKWISE_DATABASE_URL", "postgresql+psycopg://nobody@127.0.0.1:9/nothing")
    monkeypatch.setenv("RANKWISE_API_KEYS", "on")
    settings = {"DEVICES": "cpu:1", "POOL": "off"}
    with (
        ServerProcess(tmp_path / "data", settings, tmp_path / "server.log") as server,
        urllib.request.urlopen(f"{server.url}/adapters", timeout=10) as answer,
    ):
        assert json.load(answer)["items"] == []
    assert (tmp_path / "data" / "rankwise.db").is_file()
