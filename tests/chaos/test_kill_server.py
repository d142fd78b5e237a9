"""`kill -9` of the whole server: its children die with it, and after a restart the jobs go on."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from storage import adapters

SERVER = Path(__file__).parent / "pool_server.py"


@pytest.fixture
def start_server(pool: Any) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a server process on the pool's database."""
    started: list[subprocess.Popen[bytes]] = []

    def start(**changes: Any) -> subprocess.Popen[bytes]:
        settings = dataclasses.asdict(pool.settings(**changes))
        del settings["kinds"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen([sys.executable, SERVER, json.dumps(settings, default=str)], env=environment)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def kill_with_children(server: subprocess.Popen[bytes], wait_until: Any) -> None:
    """`kill -9` the server alone, and wait until everything that it started is gone."""
    family = psutil.Process(server.pid).children(recursive=True)
    server.kill()
    server.wait()
    wait_until(lambda: not any(is_running(process) for process in family), "the server's children die with it")


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def merged_adapters(pool: Any) -> list[str]:
    with pool.database.read() as session:
        return [row.id for row in adapters.list_adapters(session, limit=200).items if row.origin != "upload"]


def test_a_merge_goes_on_after_the_restart(
    pool: Any, start_server: Any, add_adapter: Any, wait_until: Any, exists: Any
) -> None:
    sources = [{"id": add_adapter(name, seed)} for seed, name in enumerate("ab")]
    job_id = pool.submit("gated_merge", adapters=sources, method="lego", gate=str(pool.gate().path))
    server = start_server(lease_seconds=3600.0)
    pid = pool.running_pid_at_gate(job_id)
    assert exists(pid)
    kill_with_children(server, wait_until)
    assert not exists(pid)
    assert pool.job(job_id).state == "running"  # nobody was left to write anything else
    start_server(lease_seconds=3600.0)
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.failures) == ("succeeded", 2, 0)
    assert merged_adapters(pool) == job.result["adapters"]


def test_children_of_a_job_die_with_the_server(pool: Any, start_server: Any, wait_until: Any, exists: Any) -> None:
    note = pool.folder / "child"
    job_id = pool.submit("stubborn", child=str(note))
    server = start_server()
    pool.running_pid(job_id)
    child = int(note.read_text())
    assert exists(child)
    kill_with_children(server, wait_until)
    start_server()
    assert pool.ended(job_id).attempt == 2


def test_a_server_killed_while_it_loads_leaves_nothing(pool: Any, start_server: Any, wait_until: Any) -> None:
    server = start_server()
    wait_until(lambda: psutil.Process(server.pid).children(), "the fork server starts")
    kill_with_children(server, wait_until)


@pytest.mark.slow
def test_servers_killed_again_and_again_lose_nothing_and_publish_once(
    pool: Any, start_server: Any, add_adapter: Any, wait_until: Any
) -> None:
    generator = random.Random(20240916)
    sources = [{"id": add_adapter(name, seed)} for seed, name in enumerate("abcd")]
    jobs = [
        pool.submit(
            "merge",
            adapters=[{**item, "weight": 1.0 + number} for item in sources],
            method="svd",
            parameters={"rank": 4},
        )
        for number in range(12)
    ]

    def seen() -> int:
        return sum(pool.job(job_id).last_event for job_id in jobs)

    for _ in range(6):
        server = start_server(devices="cpu:2", lease_seconds=3600.0)
        target = seen() + generator.randint(1, 7)
        wait_until(lambda target=target: seen() >= target or all_ended(pool, jobs), "something happens")
        kill_with_children(server, wait_until)
    start_server(devices="cpu:2", lease_seconds=3600.0)
    for job_id in jobs:
        job = pool.ended(job_id)
        assert (job.state, job.failures) == ("succeeded", 0)
        assert [event.get("state") for event in pool.events(job_id)].count("succeeded") == 1
        assert len(job.result["adapters"]) == 1
    published = [pool.job(job_id).result["adapters"][0] for job_id in jobs]
    assert sorted(merged_adapters(pool)) == sorted(published)
    assert len(set(published)) == len(jobs)


def all_ended(pool: Any, jobs: list[str]) -> bool:
    return all(pool.job(job_id).state == "succeeded" for job_id in jobs)
