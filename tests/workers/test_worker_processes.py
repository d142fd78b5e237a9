"""Rules 3 and 5: worker processes are forked, kept, and replaced; the sign of life does not come from the job."""

from __future__ import annotations

import selectors
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
from rule_kinds import KINDS

from workers.forkserver import ForkServer
from workers.local import ForkServerProcess, LocalProvider, LocalWorker


def test_the_sign_of_life_goes_on_while_a_job_holds_its_process(pool: Any) -> None:
    job_id = pool.submit("hold_the_gil", seconds=2.5)
    pool.start(lease_seconds=1.0, beat_seconds=0.2, kinds=KINDS)
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.failures) == ("succeeded", 1, 0)
    assert job.result["report"]["seconds"] >= 2.5


def test_workers_are_forked_from_a_process_that_has_loaded_everything(pool: Any) -> None:
    provider = LocalProvider(threads=1)
    pool.provider = provider
    try:
        supervisor = pool.start(kinds=KINDS)
        first, second = (pool.ended(pool.submit("origin", crashes=crashes)).result["report"] for crashes in (0, 1))
        assert first["loaded"] == ["torch", "workers.jobs.merge"]
        assert second["attempt"] == 2  # the first one's process was killed, and so replaced
        assert second["pid"] != first["pid"]
        assert second["parent"] == first["parent"]
        fork_server = psutil.Process(first["parent"])
        assert "workers.forkserver" in " ".join(fork_server.cmdline())
        # A fork keeps the command of its parent; an interpreter of its own would have another.
        assert psutil.Process(second["pid"]).cmdline() == fork_server.cmdline()
        supervisor.stop()
    finally:
        provider.close()


@pytest.mark.parametrize("stopped_by", ["a cancel", "a time-out"])
def test_a_process_that_was_stopped_serves_no_other_attempt(
    pool: Any, wait_until: Any, exists: Any, stopped_by: str
) -> None:
    note = pool.folder / "note"
    resources = {"timeout_seconds": 0.3} if stopped_by == "a time-out" else None
    job_id = pool.submit("overstay", resources=resources, note=str(note))
    pool.start(kinds=KINDS)
    pid = int(wait_until(lambda: note.exists() and note.read_text(), "the job runs"))
    if stopped_by == "a cancel":
        pool.cancel(job_id)
    assert pool.ended(job_id).state == ("cancelled" if stopped_by == "a cancel" else "failed")
    after = pool.ended(pool.submit("origin")).result["report"]
    assert after["pid"] != pid
    assert not exists(pid)


def test_a_process_whose_job_was_refused_is_kept(pool: Any) -> None:
    pool.start(kinds=KINDS)
    before = pool.ended(pool.submit("origin")).result["report"]["pid"]
    assert pool.ended(pool.submit("refuse")).state == "failed"
    assert pool.ended(pool.submit("origin")).result["report"]["pid"] == before


def test_a_preloaded_module_that_touches_cuda_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reason, a forked worker could not use the device: the start says so, as for a broken import."""
    import socket
    import types

    ours, theirs = socket.socketpair()
    fake = types.ModuleType("torch")
    fake.cuda = types.SimpleNamespace(is_initialized=lambda: True)  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "torch", fake)
    monkeypatch.setattr("workers.forkserver.gc.freeze", lambda: None)
    with ours, theirs:
        ours.sendall(b'{"preload": []}\n')
        ForkServer(theirs)._preload()
        told = ours.recv(65536).decode()
    assert "CUDA was initialised by a preloaded module" in told


@pytest.mark.parametrize("helper", ["the server", "the guardian"])
def test_what_a_job_has_started_dies_with_the_fork_server(
    pool: Any, exists: Any, wait_until: Any, monkeypatch: pytest.MonkeyPatch, helper: str
) -> None:
    """The kernel ends the workers then, but nothing that they have started. Each of two sees to that alone."""
    if helper == "the guardian":  # as when the server is frozen, or has been killed too
        monkeypatch.setattr(LocalWorker, "on_orphaned", lambda worker: worker.on_ended(None, 9, None))
    provider = LocalProvider(preload=("workers.runtime",))
    pool.provider = provider
    note = pool.folder / "child"
    try:
        pool.submit("stubborn", child=str(note))
        supervisor = pool.start()
        child = int(wait_until(lambda: note.exists() and note.read_text(), "the job has a child"))
        (worker,) = [slot["pid"] for slot in supervisor.status()]
        fork_server = psutil.Process(psutil.Process(worker).parent().pid)
        (guardian,) = [process for process in fork_server.children() if process.name() == "guardian"]
        if helper == "the server":
            guardian.kill()
        fork_server.kill()
        wait_until(lambda: not exists(worker) and not exists(child), "both are gone")
        wait_until(lambda: not exists(guardian.pid), "the guardian ends too")
        supervisor.stop()
    finally:
        provider.close()


LEADER = """
import os, signal, sys
if os.fork() == 0:
    print(os.getpid(), flush=True)
    signal.pause()
sys.stdin.read()
"""


def test_a_group_is_killed_although_its_leader_has_gone_before(exists: Any, wait_until: Any) -> None:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", LEADER]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True) as leader:
        assert leader.stdin is not None
        assert leader.stdout is not None
        member = int(leader.stdout.readline())
        ours, theirs = socket.socketpair()
        theirs.close()
        worker = LocalWorker([], lambda: None, Connection(ours.detach()), None)  # type: ignore[arg-type]
        worker.on_forked(leader.pid)
        leader.stdin.close()
        assert leader.wait(30) == 0
        assert exists(member)
        worker.on_orphaned()
        assert not worker.alive()
        wait_until(lambda: not exists(member), "its group is gone")


FORK_SERVER = """
import os, sys
from workers.guardian import Guardian
guardian = Guardian(())
watched, forgotten = map(int, sys.argv[1:])
guardian.watch(watched)
guardian.watch(forgotten)
guardian.forget(forgotten)
os._exit(0)  # without a word, as when it is killed
"""


def test_the_guardian_kills_what_was_not_reaped_and_nothing_else() -> None:
    with (
        subprocess.Popen(["sleep", "600"], start_new_session=True) as watched,
        subprocess.Popen(["sleep", "600"], start_new_session=True) as forgotten,
    ):
        try:
            subprocess.run([sys.executable, "-c", FORK_SERVER, str(watched.pid), str(forgotten.pid)], check=True)
            assert watched.wait(30) == -signal.SIGKILL
            assert forgotten.poll() is None
        finally:
            watched.kill()
            forgotten.kill()


def test_a_message_that_comes_with_the_end_of_its_worker_harms_no_other() -> None:
    """The end is taken in first when both are there at once; the closed channel must not end the thread of all."""
    ours, theirs = socket.socketpair()
    with selectors.DefaultSelector() as selector, Connection(theirs.detach()) as far_end:
        worker = LocalWorker([], lambda: None, Connection(ours.detach()), None)  # type: ignore[arg-type]
        far_end.send("ready")
        worker.on_ended(0, None, None)
        ForkServerProcess._take_message(object.__new__(ForkServerProcess), selector, worker)
    assert not worker.alive()
