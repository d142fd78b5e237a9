"""For how long a slot has been held: what its use is computed from."""

from __future__ import annotations

import time
from typing import Any

from storage.claims import Claim
from workers.lane import Lane
from workers.provider import Slot


def test_a_slot_counts_the_time_for_which_it_is_held(pool: Any, wait_until: Any) -> None:
    gate = pool.gate()
    supervisor = pool.start()

    def busy() -> float:
        (slot,) = supervisor.status()
        seconds: float = slot["busy_seconds"]
        return seconds

    wait_until(lambda: supervisor.status()[0]["state"] == "idle", "the worker is ready")
    assert busy() == 0.0
    job_id = pool.submit("wait_for_gate", gate=str(gate.path))
    pool.running_pid(job_id)
    first = wait_until(busy, "it counts while the attempt runs")
    wait_until(lambda: busy() > first, "it goes on counting")
    gate.open()
    pool.ended(job_id)
    wait_until(lambda: supervisor.status()[0]["state"] == "idle", "the slot is free")
    held = busy()
    assert held > first
    assert busy() == held
    pool.ended(pool.submit("succeed"))
    wait_until(lambda: busy() > held, "the next attempt is added")


class IdleProcess:
    """A worker process that lives until it is killed."""

    pid, host, warm, ready = 1, "here", (), True

    def __init__(self) -> None:
        self.living = True

    def alive(self) -> bool:
        return self.living

    def kill(self) -> None:
        self.living = False

    def discard(self) -> None:
        return


class Provider:
    def start(self, slots: Any, notify: Any) -> IdleProcess:
        return IdleProcess()


def test_every_slot_of_a_wide_job_is_held() -> None:
    provider: Any = Provider()
    first, second, other = (Lane(Slot(f"cpu:{number}", "cpu"), provider, lambda: None, 1.0) for number in range(3))
    for lane in (first, second, other):
        lane.ensure_worker(0.0)
    spec: Any = None
    began = time.monotonic() - 50.0
    first.assign(
        Claim("job_1", 1, "kind", {}, {}, devices=2),
        spec,
        now=began,
        lease_ends=float("inf"),
        deadline=None,
        partners=[second],
    )
    running = [lane.status()["busy_seconds"] for lane in (first, second, other)]
    first.clear()
    ended = [lane.status()["busy_seconds"] for lane in (first, second, other)]
    for seconds in (running, ended):
        assert all(50.0 <= value < 80.0 for value in seconds[:2])
        assert seconds[2] == 0.0
