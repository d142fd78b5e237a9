"""What every provider of worker processes promises the supervisor.

Another provider joins by one more parameter of the fixture `provider_under_test`.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage import claims
from workers.attempt import AttemptSpec
from workers.provider import Slot, Worker

SLOT = Slot("cpu:0", "cpu")
MIB = 1024**2


class Bell:
    """A `notify` that a test can wait for."""

    def __init__(self) -> None:
        self.rung = threading.Event()

    def __call__(self) -> None:
        self.rung.set()

    def wait_for(self, condition: Any, what: str) -> Any:
        """Looks only when the bell has rung: a provider that forgets to ring fails."""
        while not (value := condition()):
            assert self.rung.wait(30.0), f"no notification: {what}"
            self.rung.clear()
        return value


@pytest.fixture(params=["local"])
def provider_under_test(request: pytest.FixtureRequest, provider: Any) -> Any:
    return {"local": provider}[request.param]


@pytest.fixture
def bell() -> Bell:
    return Bell()


@pytest.fixture
def worker(provider_under_test: Any, bell: Bell) -> Iterator[Worker]:
    worker = provider_under_test.start(SLOT, bell)
    yield worker
    worker.kill()
    bell.wait_for(lambda: not worker.alive(), "the worker is reaped")


@pytest.fixture
def spec_of(pool: Any) -> Any:
    """Claims a job of that kind and makes the spec of its attempt."""

    def make(kind: str, **params: Any) -> AttemptSpec:
        job_id = pool.submit(kind, **params)
        with pool.database.write() as session:
            claim = claims.claim_next(session, server_id="srv_x", boot_id="run_x", slot="cpu:0", lease_seconds=60.0)
        assert claim is not None
        assert claim.job_id == job_id
        return AttemptSpec(
            job_id=job_id,
            attempt=claim.attempt,
            kind=kind,
            params=params,
            slot=SLOT.name,
            device="cpu",
            database_url=str(pool.settings().database_url),
            blob_url=pool.settings().blob_url,
            scratch=str(pool.folder / "scratch"),
            cache=str(pool.folder / "cache"),
            model_roots=(),
            function=f"pool_kinds:{kind}",
            log=str(pool.folder / "logs" / "attempt.log"),
        )

    return make


def test_it_becomes_ready_and_runs_an_attempt(worker: Worker, bell: Bell, spec_of: Any) -> None:
    bell.wait_for(lambda: worker.ready, "ready")
    assert worker.pid is not None
    assert worker.poll() is None
    worker.submit(spec_of("succeed"))
    outcome = bell.wait_for(worker.poll, "an outcome")
    assert (outcome.state, outcome.error) == ("succeeded", None)
    assert worker.alive()
    assert worker.exit()["code"] is None
    assert worker.exit()["peak_memory"] == outcome.peak_memory > MIB


def test_an_outcome_is_of_the_newest_attempt(worker: Worker, bell: Bell, spec_of: Any) -> None:
    bell.wait_for(lambda: worker.ready, "ready")
    worker.submit(spec_of("user_error"))
    first = bell.wait_for(worker.poll, "an outcome")
    assert (first.state, first.retry) == ("failed", "never")
    worker.submit(spec_of("succeed"))
    assert bell.wait_for(worker.poll, "an outcome").state == "succeeded"


def test_terminate_stops_the_attempt_at_its_next_check(worker: Worker, bell: Bell, spec_of: Any, pool: Any) -> None:
    bell.wait_for(lambda: worker.ready, "ready")
    spec = spec_of("wait_for_gate", gate=str(pool.gate().path))
    worker.submit(spec)
    pool.running_pid(spec.job_id)
    worker.terminate()
    assert bell.wait_for(worker.poll, "an outcome").state == "cancelled"
    bell.wait_for(lambda: not worker.alive(), "an interrupted process is not used again")
    assert worker.exit()["code"] == 0


def test_terminate_ends_a_worker_without_an_attempt(worker: Worker, bell: Bell) -> None:
    bell.wait_for(lambda: worker.ready, "ready")
    worker.terminate()
    bell.wait_for(lambda: not worker.alive(), "it ends")
    assert worker.exit()["code"] == 0
    assert not worker.ready


def test_kill_reaps_whatever_the_process_does(worker: Worker, bell: Bell, spec_of: Any, pool: Any, exists: Any) -> None:
    bell.wait_for(lambda: worker.ready, "ready")
    spec = spec_of("stubborn", child=str(pool.folder / "child"))
    worker.submit(spec)
    pid = pool.running_pid(spec.job_id)
    worker.terminate()
    worker.kill()
    bell.wait_for(lambda: not worker.alive(), "it is reaped")
    assert not exists(pid)
    assert worker.exit()["signal"] == signal.SIGKILL
    assert worker.exit()["peak_memory"] > MIB
    assert not Path(spec.scratch).exists()


def test_kill_before_the_process_exists_is_not_forgotten(provider_under_test: Any, bell: Bell) -> None:
    worker = provider_under_test.start(SLOT, bell)
    worker.kill()
    bell.wait_for(lambda: not worker.alive(), "it is reaped")
    worker.kill()
    worker.terminate()
    assert not worker.alive()


def test_a_crash_is_told_with_its_cause_and_log(worker: Worker, bell: Bell, spec_of: Any) -> None:
    bell.wait_for(lambda: worker.ready, "ready")
    worker.submit(spec_of("crash", times=1, signal=int(signal.SIGABRT)))
    bell.wait_for(lambda: not worker.alive(), "it is reaped")
    assert worker.poll() is None
    assert (worker.exit()["code"], worker.exit()["signal"]) == (None, signal.SIGABRT)
    assert worker.log_tail()[0] == "about to crash"


def test_what_a_crashed_worker_started_dies_with_it(
    worker: Worker, bell: Bell, spec_of: Any, pool: Any, wait_until: Any, has_ended: Any
) -> None:
    bell.wait_for(lambda: worker.ready, "ready")
    # The child holds a copy of both ends of its pipe, so it ends by nothing but a signal.
    worker.submit(spec_of("crash_with_child", child=str(pool.folder / "child")))
    bell.wait_for(lambda: not worker.alive(), "it is reaped")
    child = int((pool.folder / "child").read_text())
    wait_until(lambda: has_ended(child), "the child is killed")


def test_the_log_is_kept_until_it_is_discarded(worker: Worker, bell: Bell, spec_of: Any) -> None:
    bell.wait_for(lambda: worker.ready, "ready")
    assert worker.log_tail() == []
    worker.submit(spec_of("bug"))
    bell.wait_for(worker.poll, "an outcome")
    assert len(worker.log_tail()) == 200
    assert worker.log_tail(1)[0].startswith("KeyError")
    worker.discard()
    assert worker.log_tail() == []


def test_submitting_to_a_process_that_has_just_died_does_not_raise(worker: Worker, bell: Bell, spec_of: Any) -> None:
    bell.wait_for(lambda: worker.ready, "ready")
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    bell.wait_for(lambda: not worker.alive(), "it is reaped")
    worker.submit(spec_of("succeed"))
    assert worker.poll() is None
    assert not worker.alive()
