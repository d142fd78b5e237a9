"""`rankwise schedules`, against a real service; and a worker that fires with no server beside it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from sqlalchemy import select, update

from app.server_process import ServerProcess
from storage import database as clock
from storage.database import Database
from storage.tables import FiringRow, ScheduleRow

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 60.0
NO_SUCH = "sch_" + "0" * 32


@pytest.fixture
def params(cli: Callable[..., Any], adapters: tuple[Path, Path], remote: str) -> str:
    """Parameters of a merge of both adapters, as JSON."""
    ids = [item["id"] for item in cli("adapters", "add", *adapters, "--json").json]
    return json.dumps({"adapters": [{"id": key} for key in ids], "method": "cat"})


@pytest.fixture
def schedule(cli: Callable[..., Any], params: str) -> str:
    made = cli(
        "schedules", "create", "--params", params, "--cron", "30 2 * * *", "--timezone", "Europe/Berlin", "--json"
    )
    assert made.code == 0, made.err
    identifier: str = made.json["id"]
    return identifier


def test_create_get_and_list(cli: Callable[..., Any], params: str, tmp_path: Path) -> None:
    file = tmp_path / "params.json"
    file.write_text(params, encoding="utf-8")
    made = cli(
        "schedules", "create", "--params", f"@{file}", "--event", "base_model.deprecated", "--name", "on deprecation",
        "--overlap", "replace", "--misfire", "skip", "--disabled", "--resources", '{"timeout_seconds": 60}', "--json",
    )  # fmt: skip
    assert made.code == 0, made.err
    schedule = made.json
    assert schedule["trigger"] == {"event": "base_model.deprecated", "subject": None}
    assert (schedule["overlap"], schedule["misfire"], schedule["enabled"]) == ("replace", "skip", False)
    assert schedule["job"]["resources"] == {"timeout_seconds": 60}
    assert cli("schedules", "get", schedule["id"], "--json").json == schedule
    shown = cli("schedules", "get", schedule["id"])
    for text in ("on deprecation", schedule["id"], "base_model.deprecated", "replace"):
        assert text in shown.out
    listed = cli("schedules", "list")
    assert schedule["id"] in listed.out
    assert "disabled" in listed.out
    page = cli("schedules", "list", "--limit", "1", "--json").json
    assert page["items"][0]["id"] == schedule["id"]


def test_a_refused_schedule_shows_where(cli: Callable[..., Any], params: str) -> None:
    refused = cli("schedules", "create", "--params", '{"adapters": []}', "--cron", "0 0 * * *", "--json")
    assert (refused.code, refused.json["code"]) == (1, "invalid_request")
    assert "/job/params/adapters" in refused.err
    assert cli("schedules", "create", "--params", params, "--cron", "nonsense", "--json").json["status"] == 422
    assert cli("schedules", "get", NO_SUCH, "--json").json["code"] == "not_found"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--params", "{}"),
        ("--params", "{}", "--cron", "* * * * *", "--event", "base_model.removed"),
        ("--params", "{}", "--event", "base_model.removed", "--timezone", "UTC"),
        ("--params", "{}", "--cron", "* * * * *", "--subject", "mdl_1"),
        ("--params", "{}", "--event", "base_model.born"),
        ("--params", "[]", "--cron", "* * * * *"),
        ("--params", "{", "--cron", "* * * * *"),
        ("--params", "@/nowhere.json", "--cron", "* * * * *"),
        ("--cron", "* * * * *"),
    ],
)
def test_wrong_usage(cli: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    assert cli("schedules", "create", *arguments).code == 2


def test_update(cli: Callable[..., Any], schedule: str, params: str) -> None:
    paused = cli("schedules", "update", schedule, "--disable", "--name", "paused", "--json").json
    assert (paused["enabled"], paused["name"], paused["version"]) == (False, "paused", 2)
    one = json.dumps({**json.loads(params), "name": "one"})
    changed = cli("schedules", "update", schedule, "--enable", "--cron", "0 * * * *", "--params", one, "--json").json
    assert (changed["enabled"], changed["trigger"]) == (True, {"cron": "0 * * * *", "timezone": "UTC"})
    assert (changed["job"]["kind"], changed["job"]["params"]["name"], changed["version"]) == ("merge", "one", 3)
    stale = cli("schedules", "update", schedule, "--name", "x", "--if-version", "2", "--json")
    assert (stale.code, stale.json["code"]) == (1, "precondition_failed")
    resourced = cli("schedules", "update", schedule, "--resources", '{"timeout_seconds": 9}', "--if-version", 3)
    assert resourced.code == 0, resourced.err
    assert "timeout_seconds" in resourced.out


def test_upcoming(cli: Callable[..., Any], schedule: str) -> None:
    found = cli("schedules", "upcoming", schedule, "-n", 2, "--json").json
    assert (found["words"], len(found["items"])) == ("At 02:30 every day", 2)
    shown = cli("schedules", "upcoming", schedule)
    for text in ("At 02:30 every day", "Europe/Berlin", found["items"][0]["local"]):
        assert text in shown.out
    cli("schedules", "update", schedule, "--disable")
    assert "(disabled)" in cli("schedules", "upcoming", schedule).out


def test_trigger_and_firings(cli: Callable[..., Any], schedule: str) -> None:
    done = cli("schedules", "trigger", schedule, "--wait", "--json")
    assert done.code == 0, done.err
    assert done.json["state"] == "succeeded"
    started = cli("schedules", "trigger", schedule)
    assert started.code == 0, started.err
    assert "rankwise jobs watch job_" in started.err
    page = cli("schedules", "firings", schedule, "--json").json
    assert [item["outcome"] for item in page["items"]] == ["job", "job"]
    assert page["items"][1]["job_id"] == done.json["id"]
    assert done.json["id"] in cli("schedules", "firings", schedule).out
    first = cli("schedules", "firings", schedule, "--limit", 1)
    assert "more: --cursor" in first.err


def test_delete(cli: Callable[..., Any], schedule: str) -> None:
    assert cli("schedules", "delete", schedule).code == 1, "no answer is no"
    assert cli("schedules", "delete", schedule, "--yes", "--if-version", "7", "--json").json["status"] == 412
    assert cli("schedules", "delete", schedule, "--yes", "--json").json == {"id": schedule, "deleted": True}
    assert cli("schedules", "get", schedule).code == 1


def test_a_worker_fires_with_no_server_beside_it(
    cli: Callable[..., Any], adapters: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    with ServerProcess(data, {"POOL": "off"}, tmp_path / "server.log") as server:
        monkeypatch.setenv("RANKWISE_SERVER", server.url)
        adapter = cli("adapters", "add", adapters[0], "--json").json
        params = json.dumps({"adapters": [{"id": adapter["id"]}], "method": "cat"})
        schedule = cli("schedules", "create", "--params", params, "--cron", "0 0 1 1 *", "--json").json["id"]
    database = Database(f"sqlite:///{data / 'rankwise.db'}")
    with database.write() as session:
        due = clock.now(session) - timedelta(seconds=1)
        session.execute(update(ScheduleRow).where(ScheduleRow.id == schedule).values(next_fire_at=due))
    environment = {**os.environ, "RANKWISE_DATA_DIR": str(data), "RANKWISE_DEVICES": "cpu:1"}
    command = [sys.executable, "-m", "app.cli", "worker"]
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        deadline, outcomes = time.monotonic() + DEADLINE, list[str]()
        while not outcomes and time.monotonic() < deadline:
            threading.Event().wait(0.1)
            with database.read() as session:
                outcomes = list(session.scalars(select(FiringRow.outcome)))
        worker.send_signal(signal.SIGTERM)
        code = worker.wait(DEADLINE)
    finally:
        worker.kill()
        worker.wait()
        database.dispose()
    written = (tmp_path / "worker.log").read_text(encoding="utf-8")
    assert outcomes == ["job"], written
    assert code == 0, written


def test_windows_are_written_with_a_dash() -> None:
    from app.cli.fleets import parse_window

    assert parse_window("22:00-06:00") == {"from": "22:00", "to": "06:00"}
    zoned = {"from": "22:00", "to": "06:00", "timezone": "America/Port-au-Prince"}
    assert parse_window("22:00-06:00@America/Port-au-Prince") == zoned
    assert parse_window("always") is None
    with pytest.raises(typer.BadParameter):
        parse_window("22:00")
