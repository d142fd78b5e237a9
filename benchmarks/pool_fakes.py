"""A provider of workers that only sleep: real claims, real placement and real results, on devices that do not exist.

The workers of one supervisor live in one process of their own, as real ones would, so that what they do is not part
of the supervisor's work.
"""

from __future__ import annotations

import heapq
import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from artifacts.errors import AttemptStale
from storage import claims
from storage.database import Database
from workers.attempt import AttemptSpec, Outcome
from workers.provider import Slot

SLOTS_PER_HOST = 8
PUBLISHERS = 8  # threads that write results
Run = tuple[str, str, float, float]
"""Slot, job, and when it began and ended to sleep, by the clock that all processes share."""


class FakeWorker:
    """One worker. What it is told to do happens in the process of the machine."""

    def __init__(self, number: int, slot: Slot, notify: Callable[[], None], machine: FakeMachine) -> None:
        self.notify = notify
        self.outcome: Outcome | None = None
        self._number, self._slot, self._machine = number, slot, machine
        self._ended: dict[str, Any] | None = None

    @property
    def pid(self) -> int | None:
        return None

    @property
    def ready(self) -> bool:
        return self._ended is None

    @property
    def host(self) -> str:
        return f"host-{int(self._slot.name.partition(':')[2]) // SLOTS_PER_HOST}"

    @property
    def warm(self) -> tuple[str, ...]:
        return ()

    def submit(self, spec: AttemptSpec) -> None:
        self.outcome = None
        self._machine.send((self._number, spec.slot, spec.job_id, spec.attempt, float(spec.params["seconds"])))

    def poll(self) -> Outcome | None:
        return self.outcome

    def alive(self) -> bool:
        return self._ended is None

    def exit(self) -> dict[str, Any]:
        return self._ended or {"code": None, "signal": None, "peak_memory": None}

    def terminate(self) -> None:
        self.kill()

    def kill(self) -> None:
        if self._ended is None:
            self._machine.send((self._number, None, "", 0, 0.0))
            self._ended = {"code": None, "signal": 9, "peak_memory": None}
            self.notify()

    def log_tail(self, lines: int = 200) -> list[str]:
        return []

    def discard(self) -> None:
        return


class FakeMachine:
    """The process of the workers, seen from the supervisor."""

    def __init__(self, database_url: str) -> None:
        self.workers: list[FakeWorker] = []
        self._send_lock = threading.Lock()
        context = multiprocessing.get_context("spawn")
        self._channel, theirs = context.Pipe()
        self._process = context.Process(target=run_workers, args=(theirs, database_url), daemon=True)
        self._process.start()
        theirs.close()
        self.runs: list[Run] = []
        self.process_seconds = 0.0
        self._thread = threading.Thread(target=self._take_in, name="fake-events", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send(self, message: Any) -> None:
        with self._send_lock:
            self._channel.send(message)

    def _take_in(self) -> None:
        while True:
            message = self._channel.recv()
            if isinstance(message, list):
                self.runs = message
                return
            number, state = message
            worker = self.workers[number]
            worker.outcome = Outcome(state)
            worker.notify()

    def close(self) -> None:
        self.send(None)
        self._thread.join()
        self._process.join()


class FakeProvider:
    """Any number of slots on hosts of eight.

    Args:
        slots: their number.
        database_url: where the results are written.
    """

    def __init__(self, slots: int, database_url: str) -> None:
        self._slots = tuple(Slot(f"fake:{number}", "cpu") for number in range(slots))
        self.machine = FakeMachine(database_url)

    def slots(self) -> tuple[Slot, ...]:
        return self._slots

    def start(self, slots: Sequence[Slot], notify: Callable[[], None]) -> FakeWorker:
        worker = FakeWorker(len(self.machine.workers), slots[0], notify, self.machine)
        self.machine.workers.append(worker)
        return worker

    def close(self) -> None:
        self.machine.close()


def run_workers(channel: Connection, database_url: str) -> None:
    """The inside of the process: sleep for every worker at once, write each result when its time has come."""
    database = Database(database_url)
    lock = threading.Lock()
    asleep: list[tuple[float, int]] = []
    jobs: dict[int, tuple[str, str, int, float]] = {}  # worker → slot, job, attempt, when it began
    runs: list[Run] = []

    def publish(number: int, job_id: str, attempt: int) -> None:
        state = "succeeded"
        try:
            with database.write() as session:
                claims.fence(session, job_id, attempt)
                claims.finish_succeeded(session, job_id, attempt, {"adapters": [], "images": [], "report": {}})
        except AttemptStale:
            state = "stale"
        with lock:
            channel.send((number, state))

    with ThreadPoolExecutor(PUBLISHERS) as publishers:
        while True:
            due = asleep[0][0] if asleep else None
            if channel.poll(None if due is None else max(0.0, due - time.monotonic())):
                message = channel.recv()
                if message is None:
                    break
                number, slot, job_id, attempt, seconds = message
                if slot is None:
                    jobs.pop(number, None)
                    continue
                now = time.monotonic()
                jobs[number] = (slot, job_id, attempt, now)
                heapq.heappush(asleep, (now + seconds, number))
                continue
            ends_at, number = heapq.heappop(asleep)
            if number in jobs:
                slot, job_id, attempt, began = jobs.pop(number)
                runs.append((slot, job_id, began, ends_at))
                publishers.submit(publish, number, job_id, attempt)
    database.dispose()
    channel.send(runs)
