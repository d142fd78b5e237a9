"""Rule 5: what is decided between servers is decided by the database's clock, never by that of a process."""

from __future__ import annotations

import ast
from datetime import timedelta
from pathlib import Path

import pytest

from storage import claims, jobs
from storage import database as clock
from storage.database import Database

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("storage", "workers")
FORBIDDEN = {"datetime.now", "datetime.utcnow", "datetime.today", "time.time", "date.today"}
# What these ask is no decision that servers share: how old a file of the blob store is, by that store's clock.
ALLOWED = {"storage/blobs.py", "storage/local_blobs.py"}


def reads_of_the_clock(path: Path) -> list[str]:
    """Where a module asks its own process for the time of day, as "line: call"."""
    return [
        f"{node.lineno}: {ast.unparse(node.func)}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ".".join(ast.unparse(node.func).split(".")[-2:]) in FORBIDDEN
    ]


def test_no_module_asks_its_process_for_the_time_of_day() -> None:
    found = {
        str(path.relative_to(ROOT)): reads
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
        if (reads := reads_of_the_clock(path)) and str(path.relative_to(ROOT)) not in ALLOWED
    }
    assert found == {}


def test_such_a_call_would_be_found(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("import datetime, time\nx = datetime.datetime.now()\ny = time.time()\nz = time.monotonic()\n")
    assert reads_of_the_clock(module) == ["2: datetime.datetime.now", "3: time.time"]


def test_a_lease_ends_when_the_databases_clock_says_so(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    real, shift = clock.now, timedelta()
    monkeypatch.setattr(clock, "now", lambda session: real(session) + shift)
    with database.write() as session:
        job_id = jobs.create_job(session, "merge", {}).id
        assert claims.claim_next(session, server_id="s", boot_id="b", slot="cpu:0", lease_seconds=60) is not None
    with database.write() as session:
        assert claims.expire_leases(session) == 0
    shift = timedelta(seconds=61)
    with database.write() as session:
        assert claims.expire_leases(session) == 1
    with database.read() as session:
        job = jobs.get_job(session, job_id)
        assert (job.state, job.failures) == ("queued", 1)
