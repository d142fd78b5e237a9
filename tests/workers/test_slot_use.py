"""For how long a slot has been held: what its use is computed from."""

from __future__ import annotations

from typing import Any


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


def test_every_slot_of_a_wide_job_is_held(pool: Any, wait_until: Any) -> None:
    supervisor = pool.start(devices="cpu:2")
    pool.ended(pool.submit("exits", resources={"devices": 2}, code=3))
    wait_until(lambda: all(slot["state"] == "idle" for slot in supervisor.status()), "both slots are free")
    one, two = (slot["busy_seconds"] for slot in supervisor.status())
    assert one == two > 0.0
