"""Logs of attempts: live pieces while they run, a blob afterwards, whatever dies or is away in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from storage import claims, job_logs, jobs, log_text
from storage.blobs import BlobStore
from storage.database import Database
from storage.tables import JobAttemptRow, JobLogRow
from workers import log_shipping
from workers.log_shipping import LogKeeper, LogShipper

KINDS = {name: f"log_kinds:{name}" for name in ("talk", "silent", "die_talking", "flood", "drop_blobs")}
WRITTEN = "printed: Grüße\nto standard error\n"


def kept(pool: Any, job_id: str, attempt: int = 1) -> str | None:
    """What the blob store has of the log, once it is noted."""
    with pool.database.read() as session:
        row = session.get(JobAttemptRow, (job_id, attempt))
        sha256 = row.log_sha256 if row is not None else None
    return None if sha256 is None else b"".join(BlobStore(pool.settings().blob_url).stream(sha256)).decode()


def live(pool: Any, job_id: str, attempt: int = 1) -> str:
    with pool.database.read() as session:
        return "".join(piece.text for piece in job_logs.pieces_from(session, job_id, attempt, 0, 10_000))


def piece_count(pool: Any) -> int:
    with pool.database.read() as session:
        return session.scalar(select(func.count()).select_from(JobLogRow)) or 0


def log_files(pool: Any) -> list[Path]:
    return list((pool.folder / "work").rglob("*.log"))


def test_a_log_grows_while_the_attempt_runs_and_is_kept_when_it_has_ended(pool: Any, wait_until: Any) -> None:
    gate = pool.gate()
    job_id = pool.submit("talk", gate=str(gate.path))
    pool.start(kinds=KINDS)
    pool.running_pid(job_id)
    wait_until(lambda: live(pool, job_id).endswith("raw ?? bytes\n"), "all so far is in the database")
    shown = live(pool, job_id)
    assert shown.startswith(WRITTEN)
    assert "structured" in shown
    assert "number=7" in shown
    assert kept(pool, job_id) is None
    gate.open()
    assert pool.ended(job_id).state == "succeeded"
    assert wait_until(lambda: kept(pool, job_id), "the log is kept") == shown + "goodbye\n"
    assert piece_count(pool) == 0
    wait_until(lambda: not log_files(pool), "the file is removed")


def test_an_attempt_that_says_nothing_leaves_nothing(pool: Any, wait_until: Any) -> None:
    job_id = pool.submit("silent")
    pool.start(kinds=KINDS)
    pool.ended(job_id)
    wait_until(lambda: not log_files(pool), "the file is removed")
    assert kept(pool, job_id) is None
    assert piece_count(pool) == 0


def test_the_log_of_a_killed_worker_is_kept(pool: Any, wait_until: Any) -> None:
    job_id = pool.submit("die_talking")
    pool.start(kinds=KINDS)
    assert pool.ended(job_id).attempt == 2
    assert wait_until(lambda: kept(pool, job_id, 1), "the first log is kept") == "attempt 1\nabout to be killed"
    assert wait_until(lambda: kept(pool, job_id, 2), "the second log is kept") == "attempt 2\n"


def test_a_long_log_keeps_its_head_and_its_tail(pool: Any, wait_until: Any) -> None:
    lines = (17 << 20) // 12
    job_id = pool.submit("flood", lines=lines)
    pool.start(kinds=KINDS)
    pool.ended(job_id)
    text = wait_until(lambda: kept(pool, job_id), "the log is kept")
    assert len(text.encode()) <= 16 << 20
    left_out = lines * 12 - log_text.HEAD_BYTES - log_text.TAIL_BYTES
    head, tail = text.split(log_text.mark(left_out))
    whole = "".join(f"{number:011d}\n" for number in range(lines))
    assert head == whole[: log_text.HEAD_BYTES]
    assert tail == whole[-log_text.TAIL_BYTES :]


def test_a_long_log_does_not_fill_the_database(pool: Any, wait_until: Any) -> None:
    gate = pool.gate()
    lines = (20 << 20) // 12
    job_id = pool.submit("flood", lines=lines, gate=str(gate.path))
    pool.start(kinds=KINDS)

    def last_end() -> int:
        with pool.database.read() as session:
            found = session.execute(select(JobLogRow.sequence, JobLogRow.text).order_by(JobLogRow.sequence)).all()
        return found[-1][0] + len(found[-1][1]) if found else 0

    wait_until(lambda: last_end() == lines * 12, "the last piece is there")
    with pool.database.read() as session:
        in_database = job_logs.live_bytes(session)
    assert in_database <= log_text.LIMIT + 2 * log_shipping.PIECE_BYTES
    assert live(pool, job_id).startswith("00000000000\n")
    gate.open()
    pool.ended(job_id)
    wait_until(lambda: kept(pool, job_id), "the log is kept")


def test_an_outage_of_the_blob_store_costs_no_log_and_no_job(
    pool: Any, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_shipping, "FIRST_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(log_shipping, "LONGEST_WAIT_SECONDS", 0.2)
    gate = pool.gate()
    folder = pool.folder / "blobs"
    job_id = pool.submit("drop_blobs", gate=str(gate.path), blobs=str(folder))
    pool.start(kinds=KINDS)
    wait_until(lambda: live(pool, job_id), "the first pieces are in the database")
    gate.open()
    assert pool.ended(job_id).state == "succeeded"
    wait_until(lambda: pool.provider.logs._retry_wait > 0.05, "the store was tried")
    assert kept(pool, job_id) is None
    assert live(pool, job_id) == "before the outage\n"
    assert [path.name for path in log_files(pool)] == [f"{job_id}-1.log"]
    folder.unlink()
    folder.with_suffix(".away").rename(folder)
    assert wait_until(lambda: kept(pool, job_id), "the log is kept") == "before the outage\nthe store is gone\n"
    assert piece_count(pool) == 0


SERVER = """
import json, sys
from pathlib import Path
from workers.devices import parse_devices
from workers.local import LocalProvider
from workers.supervisor import PoolSettings, Supervisor
values = json.loads(sys.argv[1])
values["data_dir"] = Path(values["data_dir"])
provider = LocalProvider(parse_devices("cpu:1"), preload=("workers.runtime",))
supervisor = Supervisor(PoolSettings(**values), provider)
supervisor.start()
print("started", flush=True)
sys.stdin.read()
"""


def test_the_log_of_a_killed_server_is_kept_at_its_next_start(pool: Any, wait_until: Any) -> None:
    gate = pool.gate()
    job_id = pool.submit("talk", gate=str(gate.path))
    settings = pool.settings(kinds=KINDS)
    values = {name: getattr(settings, name) for name in ("server_id", "database_url", "blob_url", "devices", "kinds")}
    values["data_dir"] = str(settings.data_dir)
    command = [sys.executable, "-c", SERVER, json.dumps(values)]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    with subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}) as server:
        pid = pool.running_pid(job_id)
        server.send_signal(signal.SIGKILL)
        server.wait(30)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the worker has died with its server")
    assert [found.name for found in log_files(pool)] == [f"{job_id}-1.log"]
    pool.start(kinds=KINDS)
    text = wait_until(lambda: kept(pool, job_id), "the log of the first attempt is kept")
    assert text.startswith(WRITTEN)
    assert "goodbye" not in text
    gate.open()
    assert pool.ended(job_id).attempt == 2
    second = wait_until(lambda: kept(pool, job_id, 2), "the log of the second attempt is kept")
    assert second.endswith("goodbye\n")


@pytest.fixture
def running(database: Database) -> tuple[str, int]:
    """A job in its first attempt."""
    with database.write() as session:
        jobs.create_job(session, "merge", {})
        claim = claims.claim_next(session, server_id="srv", boot_id="boot", slot="cpu:0", lease_seconds=600)
    assert claim is not None
    return claim.job_id, claim.attempt


@pytest.fixture
def keeper() -> Any:
    keeper = LogKeeper()
    yield keeper
    keeper.flush(10)


def url_of(database: Database) -> str:
    return database.url.render_as_string(hide_password=False)


def test_a_shipper_stops_when_its_attempt_counts_no_more(
    database: Database, running: tuple[str, int], tmp_path: Path
) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\n")
    shipper = LogShipper(path, *running, lambda: database, every_seconds=0.01)
    with shipper:
        with database.write() as session:
            claims.finish_failed(session, *running, {"code": "x", "detail": "y"})
            written = session.scalar(select(func.count()).select_from(JobLogRow))
        path.write_bytes(b"one\ntwo\n")
        shipper._thread.join(30)
        assert not shipper._thread.is_alive()
    assert shipper.failure is None
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(JobLogRow)) == written


def test_a_shipper_goes_on_after_an_outage_of_the_database(
    database: Database, running: tuple[str, int], tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\n")
    file = database.path
    assert file is not None
    away = file.with_suffix(".away")
    file.rename(away)
    with LogShipper(path, *running, lambda: database, every_seconds=0.01) as shipper:
        wait_until(lambda: shipper.failure is not None, "a turn has failed")
        path.write_bytes(b"one\ntwo\n")
        away.rename(file)

        def shown() -> bool:
            with database.read() as session:
                return "".join(piece.text for piece in job_logs.pieces_from(session, *running, 0)) == "one\ntwo\n"

        wait_until(shown, "the log is in the database")


def test_a_shipper_cuts_no_character_in_two(database: Database, running: tuple[str, int], tmp_path: Path) -> None:
    path = tmp_path / "log"
    data = "a€".encode()
    shipper = LogShipper(path, *running, lambda: database)
    for end in range(1, len(data) + 1):
        path.write_bytes(data[:end])
        shipper.ship()
    with database.read() as session:
        assert [piece.text for piece in job_logs.pieces_from(session, *running, 0)] == ["a", "€"]


def test_a_shipper_far_behind_leaves_out_the_middle(
    database: Database, running: tuple[str, int], tmp_path: Path
) -> None:
    path = tmp_path / "log"
    shipper = LogShipper(path, *running, lambda: database)
    path.write_bytes(b"a" * log_text.HEAD_BYTES)
    while shipper.ship():
        pass
    assert shipper._offset == log_text.HEAD_BYTES
    with path.open("ab") as file:
        file.truncate(3 * log_text.LIMIT)
    assert shipper.ship()
    with database.read() as session:
        pieces = job_logs.pieces_from(session, *running, log_text.HEAD_BYTES, 1000)
    assert pieces[0].offset == 3 * log_text.LIMIT - log_text.TAIL_BYTES
    assert set(pieces[0].text) == {"?"}


def test_a_log_of_no_attempt_is_removed(
    database: Database, keeper: LogKeeper, tmp_path: Path, running: tuple[str, int]
) -> None:
    stranger, known = tmp_path / f"job_{'0' * 32}-1.log", tmp_path / f"{running[0]}-1.log"
    for path in (stranger, known):
        path.write_bytes(b"text\n")
    keeper.keep(tmp_path / "not-a-log.txt", url_of(database), (tmp_path / "blobs").as_uri())
    assert keeper.keep_folder(tmp_path, url_of(database), (tmp_path / "blobs").as_uri()) == 2
    assert keeper.flush(10)
    assert not stranger.exists()
    assert not known.exists()
    with database.read() as session:
        assert job_logs.log_state(session, *running).sha256 is not None


def test_one_log_that_can_not_be_read_does_not_keep_the_others(
    database: Database, keeper: LogKeeper, tmp_path: Path, running: tuple[str, int]
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / f"job_{'0' * 32}-1.log").mkdir()
    (folder / f"{running[0]}-1.log").write_bytes(b"text\n")
    keeper.keep_folder(folder, url_of(database), (tmp_path / "blobs").as_uri())
    assert keeper.flush(10)
    with database.read() as session:
        assert job_logs.log_state(session, *running).sha256 is not None


def test_logs_that_wait_are_bounded(
    database: Database, keeper: LogKeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    monkeypatch.setattr(log_shipping, "MAX_WAITING_FILES", 2)
    blocked = tmp_path / "blobs"
    blocked.write_bytes(b"in the way")
    paths = [tmp_path / f"job_{number:032x}-1.log" for number in range(3)]
    for path in paths:
        path.write_bytes(b"text\n")
    with paths[2].open("ab") as file:
        file.truncate(log_text.LIMIT + 1)
    for path in paths:
        keeper.keep(path, url_of(database), blocked.as_uri())
    wait_until(lambda: not paths[0].exists(), "the oldest is given up")
    assert paths[1].exists()
    wait_until(lambda: paths[2].stat().st_size <= log_text.LIMIT, "the longest is cut")
    assert not keeper.flush(0.0)
    assert paths[1].exists()
