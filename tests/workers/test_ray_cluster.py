"""The pool on a Ray cluster whose nodes come, go and refuse: what the supervisor and the job's owner learn."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from structlog.testing import capture_logs

from storage import claiming
from workers.attempt import AttemptSpec
from workers.ray_provider import RayProvider
from workers.supervisor import Supervisor

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SLOT = {"rankwise_slot": 1}
START_SECONDS = 120  # a node starts several interpreters for its first actor
# Ray holds a node for lost after a few seconds instead of about 20.
QUICK_LOSS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 10_000,
    "health_check_failure_threshold": 3,
}


def nothing() -> None:
    """A `notify` for tests that poll."""


def started(provider: RayProvider, wait_until: Any, slots: int = 1) -> Any:
    """A worker that is ready, on the first slots."""
    wait_until(lambda: len(provider.slots()) >= slots, "the slots are known", START_SECONDS)
    worker = provider.start(provider.slots()[:slots], nothing)
    wait_until(lambda: worker.ready or not worker.alive(), "the worker is ready", START_SECONDS)
    assert worker.ready, worker.exit()
    return worker


def with_version(provider: RayProvider, version: str) -> None:
    plan = dataclasses.replace(provider._request.plan, version=version)
    provider._request = dataclasses.replace(provider._request, plan=plan)


def test_a_node_with_another_version_refuses(make_ray_provider: Any, wait_until: Any) -> None:
    provider = make_ray_provider()
    with_version(provider, "0.0.1")
    wait_until(provider.slots, "the slots are known")
    worker = provider.start(provider.slots()[:1], nothing)
    wait_until(lambda: not worker.alive(), "it is refused")
    assert worker.exit()["code"] is None
    assert "and the server 0.0.1; run the same image everywhere" in worker.exit()["lost"]


def test_the_death_of_an_actor_is_told_and_the_slot_is_served_again(
    make_ray_provider: Any, wait_until: Any, exists: Any
) -> None:
    provider = make_ray_provider()
    worker = started(provider, wait_until)
    forkserver = psutil.Process(worker.pid).parent()
    assert forkserver is not None
    actor = forkserver.parent()
    assert actor is not None
    actor.kill()
    wait_until(lambda: not worker.alive(), "the loss is told")
    assert (worker.exit()["code"], worker.exit()["signal"]) == (None, None)
    assert provider.slots()[0].name.partition("@")[2] in worker.exit()["lost"]
    wait_until(lambda: not exists(worker.pid) and not forkserver.is_running(), "its processes end with it")
    second = started(provider, wait_until)
    assert second.pid != worker.pid


@pytest.mark.parametrize("killed", ["actor", "fork server", "driver"])
def test_children_of_a_job_die_with_the_actor(
    make_ray_provider: Any, wait_until: Any, has_ended: Any, pool: Any, ray_spec: Any, killed: str
) -> None:
    provider = make_ray_provider()
    worker = started(provider, wait_until)
    spec = ray_spec("stubborn", child=str(pool.folder / "child"))
    worker.submit(spec)
    pool.running_pid(spec.job_id)
    child = int((pool.folder / "child").read_text())
    fork_server, actor = psutil.Process(worker.pid).parents()[:2]
    os.kill(
        {"actor": actor.pid, "fork server": fork_server.pid, "driver": provider._driver.pid}[killed], signal.SIGKILL
    )
    wait_until(lambda: has_ended(child), "the child of the job dies")
    wait_until(lambda: not worker.alive(), "the loss is told")
    provider.close()


def test_everything_ends_with_the_process_that_talks_to_ray(
    make_ray_provider: Any, wait_until: Any, exists: Any
) -> None:
    provider = make_ray_provider()
    worker = started(provider, wait_until)
    with capture_logs() as logs:
        os.kill(provider._driver.pid, signal.SIGKILL)
        wait_until(lambda: not worker.alive(), "the loss is told")
        assert provider.slots() == ()
        wait_until(provider.slots, "another process connects")
    assert "connection to the Ray cluster was lost" in worker.exit()["lost"]
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["ray_driver_lost"]
    wait_until(lambda: not exists(worker.pid), "the worker process ends")
    started(provider, wait_until)


def test_workers_see_the_gpus_that_ray_gives_them(
    make_ray_cluster: Any, make_ray_provider: Any, wait_until: Any, pool: Any, ray_spec: Any
) -> None:
    """Ray believes what it is told, so the GPUs need not exist for this."""
    provider = make_ray_provider(make_ray_cluster({"num_cpus": 2, "num_gpus": 2}).address)
    wait_until(lambda: len(provider.slots()) == 2, "the slots are known")
    assert [slot.device for slot in provider.slots()] == ["cuda:0", "cuda:1"]

    def visible(worker: Any) -> str:
        wait_until(lambda: worker.ready or not worker.alive(), "the worker is ready", START_SECONDS)
        spec = ray_spec("succeed")
        worker.submit(spec)
        wait_until(worker.poll, "the attempt ends")
        report = pool.job(spec.job_id).result["report"]
        assert report["device"] == "cuda:0"
        return str(report["visible_devices"])

    single = [provider.start([slot], nothing) for slot in provider.slots()]
    assert {visible(worker) for worker in single} == {"0", "1"}
    for worker in single:
        worker.kill()
        wait_until(lambda worker=worker: not worker.alive(), "it is reaped")
    assert sorted(visible(provider.start(provider.slots(), nothing)).split(",")) == ["0", "1"]
    provider.close()


SERVER = """
import signal, sys, threading
from workers.ray_provider import RayProvider
provider = RayProvider(sys.argv[1], work_dir=sys.argv[2], preload=("workers.runtime",))
changed = threading.Event()
while not provider.slots():
    changed.wait(0.05)  # nobody tells when the nodes are known
worker = provider.start(provider.slots()[:1], changed.set)
while not worker.ready:
    changed.wait()
    changed.clear()
print(provider._driver.pid, worker.pid, flush=True)
signal.pause()
"""


def test_everything_ends_with_a_server_that_is_killed(ray_cluster: Any, wait_until: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVER, ray_cluster.address, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        pids = [int(pid) for pid in server.stdout.readline().split() if pid.isdigit()]
        while len(pids) < 2:  # what is logged comes before
            pids = [int(pid) for pid in server.stdout.readline().split() if pid.isdigit()]
        driver, worker = (psutil.Process(pid) for pid in pids)
        family = [driver, worker, *worker.parents()[:2]]
        server.kill()
    wait_until(lambda: not any(process.is_running() for process in family), "driver, actor and worker are gone")


def test_a_kill_that_the_actor_does_not_confirm_ends_the_actor(
    make_ray_provider: Any, wait_until: Any, exists: Any, has_ended: Any, pool: Any, ray_spec: Any
) -> None:
    provider = make_ray_provider()
    worker = started(provider, wait_until)
    spec = ray_spec("stubborn", child=str(pool.folder / "child"))
    worker.submit(spec)
    pool.running_pid(spec.job_id)
    forkserver = psutil.Process(worker.pid).parent()
    assert forkserver is not None
    forkserver.suspend()  # nobody carries out the signal
    worker.kill()
    wait_until(lambda: not worker.alive(), "it is told to have ended", 40)
    assert worker.exit()["signal"] == signal.SIGKILL
    forkserver.resume()
    wait_until(lambda: not exists(worker.pid), "the process is gone")
    # Ray kills the children of an actor that it ends, unless it is told not to: then nobody would be left to do this.
    child = int((pool.folder / "child").read_text())
    wait_until(lambda: has_ended(child), "the child of the job is gone")
    started(provider, wait_until)
    provider.close()


def test_a_worker_that_waits_for_resources_can_be_killed(make_ray_provider: Any, wait_until: Any) -> None:
    first, second = make_ray_provider(), make_ray_provider()
    running = started(first, wait_until, slots=2)
    wait_until(second.slots, "the slots are known")
    waiting = second.start(second.slots()[:1], nothing)
    assert waiting.alive()
    waiting.kill()
    wait_until(lambda: not waiting.alive(), "it ends")
    assert waiting.exit()["signal"] == signal.SIGKILL
    assert running.alive()


def test_what_a_killed_actor_left_on_the_node_is_removed(
    make_ray_provider: Any, wait_until: Any, ray_work_dir: Path
) -> None:
    provider = make_ray_provider()
    worker = started(provider, wait_until)
    (folder,) = [path for path in ray_work_dir.glob("actor-*") if is_locked(path / "lock")]
    psutil.Process(worker.pid).parents()[1].kill()
    wait_until(lambda: not worker.alive(), "the loss is told")
    assert folder.exists()
    started(provider, wait_until)
    assert not folder.exists()
    provider.close()
    assert list(ray_work_dir.glob("actor-*")) == []


def is_locked(path: Path) -> bool:
    import fcntl

    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.fixture
def ray_spec(pool: Any) -> Callable[..., Any]:
    """Claims a job and makes the spec of its attempt."""

    def make(kind: str, **params: Any) -> AttemptSpec:
        job_id = pool.submit(kind, **params)
        with pool.database.write() as session:
            claim = claiming.claim_next(session, server_id="srv_x", boot_id="run_x", slot="s", lease_seconds=60.0)
        assert claim is not None
        return AttemptSpec(
            job_id=job_id,
            attempt=claim.attempt,
            kind=kind,
            params=params,
            slot="s",
            device="cpu",
            database_url=str(pool.settings().database_url),
            blob_url=pool.settings().blob_url,
            scratch="/elsewhere",
            cache="/elsewhere",
            model_roots=(),
            function=f"pool_kinds:{kind}",
            log="/elsewhere/log",
        )

    return make


def test_a_lost_node_takes_its_slot_along_and_its_job_succeeds_on_the_other(
    make_ray_cluster: Any, make_ray_provider: Any, pool: Any, wait_until: Any, has_ended: Any
) -> None:
    head = {"num_cpus": 0, "_system_config": QUICK_LOSS}
    two_nodes = make_ray_cluster(head, {"resources": SLOT}, {"resources": SLOT})
    provider = make_ray_provider(two_nodes.address)
    supervisor = Supervisor(pool.settings(pool="ray"), provider)
    pool.supervisors.append(supervisor)
    supervisor.start()
    idle = ["idle", "idle"]
    wait_until(lambda: [slot["state"] for slot in supervisor.status()] == idle, "both nodes are ready", START_SECONDS)
    job_id = pool.submit("wait_once", gate=str(pool.gate().path))
    pid = pool.running_pid(job_id)
    (busy,) = [slot for slot in supervisor.status() if slot["job_id"] == job_id]
    number = next(n for n, node in enumerate(two_nodes.nodes) if node.startswith(busy["name"].partition("@")[2]))
    assert two_nodes.lose(number) == []
    wait_until(lambda: pool.job(job_id).state == "succeeded", "the job succeeds on the other node", 90)
    job = pool.job(job_id)
    assert (job.attempt, job.failures) == (2, 1)
    first, second = pool.attempts(job_id)
    assert "was lost" in first.exit["lost"]
    assert first.slot.partition("@")[2] != second.slot.partition("@")[2]
    reason = next(event["reason"] for event in pool.events(job_id) if event.get("reason"))
    assert reason["code"] == "worker_lost"
    assert busy["name"].partition("@")[2] in reason["detail"]
    wait_until(lambda: has_ended(pid), "the first attempt's process is gone")
    wait_until(lambda: len(supervisor.status()) == 1, "the slot is gone")
    two_nodes.add(resources=SLOT)
    wait_until(lambda: len(supervisor.status()) == 2, "a new node brings a slot")
    again = [pool.submit("succeed") for _ in range(4)]
    assert {pool.ended(item).state for item in again} == {"succeeded"}
    supervisor.stop()
    provider.close()


def test_a_cluster_with_a_token_wants_it(
    make_ray_cluster: Any, make_ray_provider: Any, monkeypatch: pytest.MonkeyPatch, wait_until: Any, tmp_path: Path
) -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 40}
    cluster = make_ray_cluster({"resources": SLOT}, environment=token)
    monkeypatch.setenv("HOME", str(tmp_path))
    for variables in ({"RAY_AUTH_MODE": "disabled"}, {**token, "RAY_AUTH_TOKEN": "b" * 40}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        refused = make_ray_provider(cluster.address)
        with capture_logs() as logs:
            refused.slots()
            wait_until(lambda refused=refused: refused._driver.lost, "it is refused", 90)
            refused.close()
        (refusal,) = [entry for entry in logs if entry["log_level"] == "error"]
        assert refusal["event"] == "ray_unreachable", refusal
        assert "RAY_AUTH_TOKEN" in refusal["hint"], refusal
    for name, value in token.items():
        monkeypatch.setenv(name, value)
    provider = make_ray_provider(cluster.address)
    started(provider, wait_until)


def test_a_ray_client_address_works_as_well(make_ray_cluster: Any, make_ray_provider: Any, wait_until: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        port = probe.getsockname()[1]
    make_ray_cluster({"resources": {"rankwise_slot": 2}, "ray_client_server_port": port})
    provider = make_ray_provider(f"ray://127.0.0.2:{port}")
    worker = started(provider, wait_until)
    worker.kill()
    wait_until(lambda: not worker.alive(), "it is reaped")
    assert worker.exit()["signal"] == signal.SIGKILL
    started(provider, wait_until, slots=2)
