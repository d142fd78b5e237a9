"""What every provider of worker processes promises the supervisor: one suite, run on local processes and on Ray.

Another provider joins by one more parameter of the fixture `bench`.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from storage import claiming
from workers.attempt import AttemptSpec
from workers.provider import Slot, Worker, WorkerProvider, WorkerStartError

MIB = 1024**2
PROVIDERS = ["local", pytest.param("ray", marks=pytest.mark.ray)]


class Bell:
    """A `notify` that a test can wait for."""

    def __init__(self) -> None:
        self.rung = threading.Event()

    def __call__(self) -> None:
        self.rung.set()

    def wait_for(self, condition: Any, what: str) -> Any:
        """Looks only when the bell has rung: a provider that forgets to ring fails."""
        while not (value := condition()):
            assert self.rung.wait(90.0), f"no notification: {what}"
            self.rung.clear()
        return value


@dataclass
class Bench:
    """A provider with two slots of one host, and where its worker processes leave files."""

    provider: WorkerProvider
    slots: tuple[Slot, ...]
    host: str
    scratch: Callable[[], list[Path]]
    logs: Callable[[], list[Path]]


@pytest.fixture(params=PROVIDERS)
def bench(request: pytest.FixtureRequest, tmp_path: Path, wait_until: Any) -> Bench:
    if request.param == "local":
        slots = (Slot("cpu:0", "cpu"), Slot("cpu:1", "cpu"))
        provider = request.getfixturevalue("provider")
        scratch, logs = lambda: list(tmp_path.glob("work/*")), lambda: list(tmp_path.glob("logs/*"))
        return Bench(provider, slots, os.uname().nodename, scratch, logs)
    provider = request.getfixturevalue("ray_provider")
    slots = wait_until(lambda: len(provider.slots()) == 2 and provider.slots(), "the cluster's slots are known")
    cluster, folder = request.getfixturevalue("ray_cluster"), request.getfixturevalue("ray_work_dir")
    scratch, logs = lambda: list(folder.glob("actor-*/job_*")), lambda: list(folder.glob("actor-*/logs/*"))
    return Bench(provider, slots, cluster.nodes[0][:12], scratch, logs)


@pytest.fixture
def bell() -> Bell:
    return Bell()


@pytest.fixture
def worker(bench: Bench, bell: Bell) -> Iterator[Worker]:
    worker = bench.provider.start(bench.slots[:1], bell)
    yield worker
    worker.kill()
    bell.wait_for(lambda: not worker.alive(), "the worker is reaped")


@pytest.fixture
def spec_of(bench: Bench, pool: Any) -> Any:
    """Claims a job of that kind and makes the spec of its attempt."""

    def make(kind: str, devices: int = 1, function: str = "", **params: Any) -> AttemptSpec:
        job_id = pool.submit(kind, **params)
        with pool.database.write() as session:
            claim = claiming.claim_next(session, server_id="srv_x", boot_id="run_x", slot="cpu:0", lease_seconds=60.0)
        assert claim is not None
        assert claim.job_id == job_id
        return AttemptSpec(
            job_id=job_id,
            attempt=claim.attempt,
            kind=kind,
            params=params,
            slot=bench.slots[0].name,
            device="cpu",
            devices=devices,
            database_url=str(pool.settings().database_url),
            blob_url=pool.settings().blob_url,
            scratch=str(pool.folder / "work" / f"{job_id}-{claim.attempt}"),
            cache=str(pool.folder / "cache"),
            model_roots=(),
            function=function or f"pool_kinds:{kind}",
            log=str(pool.folder / "logs" / f"{job_id}-{claim.attempt}.log"),
        )

    return make


def ready(worker: Worker, bell: Bell) -> Worker:
    bell.wait_for(lambda: worker.ready or not worker.alive(), "ready")
    assert worker.ready, worker.exit()
    return worker


def test_it_has_slots_with_names_of_their_own(bench: Bench) -> None:
    assert len({slot.name for slot in bench.slots}) == 2
    assert all(len(slot.name) <= 40 for slot in bench.slots)  # what the column of the attempts takes
    assert {slot.device for slot in bench.slots} == {"cpu"}


def test_it_becomes_ready_and_runs_an_attempt(bench: Bench, worker: Worker, bell: Bell, spec_of: Any) -> None:
    ready(worker, bell)
    assert worker.pid is not None
    assert worker.host == bench.host
    assert worker.poll() is None
    worker.submit(spec_of("succeed"))
    outcome = bell.wait_for(worker.poll, "an outcome")
    assert (outcome.state, outcome.error) == ("succeeded", None)
    assert worker.alive()
    assert worker.exit()["code"] is None
    assert worker.exit()["peak_memory"] == outcome.peak_memory > MIB


def test_an_attempt_sees_its_own_process_device_and_folder(
    worker: Worker, bell: Bell, spec_of: Any, pool: Any, bench: Bench
) -> None:
    ready(worker, bell)
    spec = spec_of("succeed")
    worker.submit(spec)
    bell.wait_for(worker.poll, "an outcome")
    report = pool.job(spec.job_id).result["report"]
    assert (report["pid"], report["session"], report["device"]) == (worker.pid, worker.pid, "cpu")
    assert report["visible_devices"] == ""
    assert int(report["omp_threads"]) >= 1
    assert not Path(report["scratch"]).exists()
    assert bench.scratch() == []


def test_an_outcome_is_of_the_newest_attempt(worker: Worker, bell: Bell, spec_of: Any) -> None:
    ready(worker, bell)
    for _ in range(3):
        worker.submit(spec_of("user_error"))
        assert worker.poll() is None
        first = bell.wait_for(worker.poll, "an outcome")
        assert (first.state, first.retry) == ("failed", "never")
        worker.discard()
        worker.submit(spec_of("succeed"))
        assert worker.poll() is None
        assert bell.wait_for(worker.poll, "an outcome").state == "succeeded"
        worker.discard()


def test_it_tells_which_base_models_are_warm(worker: Worker, bell: Bell, spec_of: Any) -> None:
    ready(worker, bell)
    assert worker.warm == ()
    worker.submit(spec_of("succeed", function="provider_kinds:warms"))
    assert bell.wait_for(worker.poll, "an outcome").warm == ("mdl_b", "mdl_a")
    assert worker.warm == ("mdl_b", "mdl_a")
    worker.kill()
    bell.wait_for(lambda: not worker.alive(), "it is reaped")
    assert worker.warm == ()


def test_terminate_stops_the_attempt_at_its_next_check(worker: Worker, bell: Bell, spec_of: Any, pool: Any) -> None:
    ready(worker, bell)
    spec = spec_of("wait_for_gate", gate=str(pool.gate().path))
    worker.submit(spec)
    pool.running_pid(spec.job_id)
    worker.terminate()
    assert bell.wait_for(worker.poll, "an outcome").state == "cancelled"
    bell.wait_for(lambda: not worker.alive(), "an interrupted process is not used again")
    assert worker.exit()["code"] == 0


def test_terminate_ends_a_worker_without_an_attempt(worker: Worker, bell: Bell) -> None:
    ready(worker, bell)
    worker.terminate()
    bell.wait_for(lambda: not worker.alive(), "it ends")
    assert worker.exit()["code"] == 0
    assert not worker.ready


def test_kill_reaps_whatever_the_process_does(
    worker: Worker, bell: Bell, spec_of: Any, pool: Any, exists: Any, has_ended: Any, wait_until: Any, bench: Bench
) -> None:
    ready(worker, bell)
    spec = spec_of("stubborn", child=str(pool.folder / "child"))
    worker.submit(spec)
    pid = pool.running_pid(spec.job_id)
    worker.terminate()
    worker.kill()
    bell.wait_for(lambda: not worker.alive(), "it is reaped")
    assert not exists(pid)
    child = int((pool.folder / "child").read_text())
    wait_until(lambda: has_ended(child), "its child is killed")
    assert (worker.exit()["code"], worker.exit()["signal"]) == (None, signal.SIGKILL)
    assert worker.exit()["peak_memory"] > MIB
    assert bench.scratch() == []


def test_kill_before_the_process_exists_is_not_forgotten(bench: Bench, bell: Bell) -> None:
    worker = bench.provider.start(bench.slots[:1], bell)
    worker.kill()
    bell.wait_for(lambda: not worker.alive(), "it is reaped")
    worker.kill()
    worker.terminate()
    assert not worker.alive()
    assert worker.exit()["signal"] == signal.SIGKILL


def test_a_crash_is_told_with_its_cause_and_log(worker: Worker, bell: Bell, spec_of: Any) -> None:
    ready(worker, bell)
    worker.submit(spec_of("crash", times=1, signal=int(signal.SIGABRT)))
    bell.wait_for(lambda: not worker.alive(), "it is reaped")
    assert worker.poll() is None
    assert (worker.exit()["code"], worker.exit()["signal"]) == (None, signal.SIGABRT)
    assert worker.log_tail()[0] == "about to crash"


def test_an_exit_in_the_middle_is_told_with_its_code(worker: Worker, bell: Bell, spec_of: Any) -> None:
    ready(worker, bell)
    worker.submit(spec_of("exits", code=7))
    bell.wait_for(lambda: not worker.alive(), "it is reaped")
    assert worker.poll() is None
    assert (worker.exit()["code"], worker.exit()["signal"]) == (7, None)
    assert worker.exit()["peak_memory"] > MIB


def test_the_memory_of_a_crashed_process_is_told(worker: Worker, bell: Bell, spec_of: Any) -> None:
    ready(worker, bell)
    worker.submit(spec_of("big_memory", bytes=300 * MIB, then="crash"))
    bell.wait_for(lambda: not worker.alive(), "it is reaped")
    assert worker.exit()["signal"] == signal.SIGSEGV
    assert worker.exit()["peak_memory"] > 300 * MIB


def test_what_a_crashed_worker_started_dies_with_it(
    worker: Worker, bell: Bell, spec_of: Any, pool: Any, wait_until: Any, has_ended: Any
) -> None:
    ready(worker, bell)
    # The child holds a copy of both ends of its pipe, so it ends by nothing but a signal.
    worker.submit(spec_of("crash_with_child", child=str(pool.folder / "child")))
    bell.wait_for(lambda: not worker.alive(), "it is reaped")
    child = int((pool.folder / "child").read_text())
    wait_until(lambda: has_ended(child), "the child is killed")


def test_a_log_is_told_until_it_is_discarded_and_then_kept(
    worker: Worker, bell: Bell, spec_of: Any, pool: Any, wait_until: Any, bench: Bench
) -> None:
    ready(worker, bell)
    assert worker.log_tail() == []
    spec = spec_of("bug")
    worker.submit(spec)
    bell.wait_for(worker.poll, "an outcome")
    assert len(worker.log_tail()) == 200
    assert worker.log_tail(1)[0].startswith("KeyError")
    worker.discard()
    wait_until(lambda: pool.attempts(spec.job_id)[0].log_sha256, "the log is in the blob store")
    wait_until(lambda: worker.log_tail() == [], "the log is not here any more")
    wait_until(lambda: not any(spec.job_id in path.name for path in bench.logs()), "the file is removed")


def test_the_log_of_a_crash_is_kept_after_the_worker_is_replaced(
    bench: Bench, worker: Worker, bell: Bell, spec_of: Any, pool: Any, wait_until: Any
) -> None:
    ready(worker, bell)
    spec = spec_of("crash", times=1)
    worker.submit(spec)
    bell.wait_for(lambda: not worker.alive(), "it is reaped")
    worker.discard()
    second = ready(bench.provider.start(bench.slots[:1], bell), bell)
    wait_until(lambda: pool.attempts(spec.job_id)[0].log_sha256, "the log is in the blob store")
    second.kill()
    bell.wait_for(lambda: not second.alive(), "it is reaped")


def test_submitting_to_a_process_that_has_just_died_does_not_raise(worker: Worker, bell: Bell, spec_of: Any) -> None:
    ready(worker, bell)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    bell.wait_for(lambda: not worker.alive(), "it is reaped")
    worker.submit(spec_of("succeed"))
    assert worker.poll() is None
    assert not worker.alive()


def test_a_slot_is_served_by_a_new_process_after_the_end_of_the_old(
    bench: Bench, bell: Bell, spec_of: Any, exists: Any
) -> None:
    pids = set()
    for _ in range(3):
        worker = ready(bench.provider.start(bench.slots[:1], bell), bell)
        pids.add(worker.pid)
        worker.submit(spec_of("succeed"))
        assert bell.wait_for(worker.poll, "an outcome").state == "succeeded"
        worker.discard()
        worker.kill()
        bell.wait_for(lambda worker=worker: not worker.alive(), "it is reaped")
    assert len(pids) == 3
    assert not any(exists(pid) for pid in pids)


def test_slots_are_served_side_by_side_and_one_end_touches_no_other(bench: Bench, bell: Bell, spec_of: Any) -> None:
    first, second = (ready(bench.provider.start([slot], bell), bell) for slot in bench.slots)
    assert first.pid != second.pid
    assert first.host == second.host
    first.kill()
    bell.wait_for(lambda: not first.alive(), "it is reaped")
    second.submit(spec_of("succeed"))
    assert bell.wait_for(second.poll, "an outcome").state == "succeeded"
    second.kill()
    bell.wait_for(lambda: not second.alive(), "it is reaped")


def test_one_worker_on_two_slots_and_the_slots_again(bench: Bench, bell: Bell, spec_of: Any, pool: Any) -> None:
    single = ready(bench.provider.start(bench.slots[:1], bell), bell)
    single.kill()
    bell.wait_for(lambda: not single.alive(), "it is reaped")
    both = ready(bench.provider.start(bench.slots, bell), bell)
    spec = spec_of("succeed", devices=2, function="provider_kinds:count_ranks")
    both.submit(spec)
    outcome = bell.wait_for(both.poll, "an outcome")
    assert outcome.state == "succeeded", outcome.error
    assert pool.job(spec.job_id).result["report"] == {"ranks": 2, "groups": [both.pid, both.pid]}
    both.kill()
    bell.wait_for(lambda: not both.alive(), "it is reaped")
    again = ready(bench.provider.start(bench.slots[1:], bell), bell)
    again.kill()
    bell.wait_for(lambda: not again.alive(), "it is reaped")


@pytest.fixture(params=PROVIDERS)
def fresh_provider(request: pytest.FixtureRequest) -> tuple[WorkerProvider, list[Slot]]:
    """A provider that nothing else uses, which the test closes."""
    if request.param == "local":
        from workers.local import LocalProvider

        slots = [Slot("cpu:0", "cpu")]
        return LocalProvider(slots, preload=("workers.runtime",)), slots
    return request.getfixturevalue("make_ray_provider")(), []


def test_closing_leaves_no_process_and_no_thread(fresh_provider: Any, bell: Bell, wait_until: Any, exists: Any) -> None:
    provider, _ = fresh_provider
    threads = set(threading.enumerate())
    (slot, *_) = wait_until(provider.slots, "the slots are known")
    worker = ready(provider.start([slot], bell), bell)
    pid = wait_until(lambda: worker.pid, "its process is known")
    provider.close()
    assert not worker.alive()
    wait_until(lambda: not exists(pid), "the process is gone")
    assert set(threading.enumerate()) <= threads
    worker.terminate()
    worker.kill()
    worker.discard()


def test_a_closed_ray_provider_starts_nothing(request: pytest.FixtureRequest, bell: Bell) -> None:
    from workers.ray_provider import RayProvider

    provider = RayProvider("127.0.0.1:1")
    provider.close()
    assert provider.slots() == ()
    with pytest.raises(WorkerStartError):
        provider.start([Slot("cpu:0", "cpu")], bell)
