"""The adversary: carries out the acts of a plan on real processes, and writes down what it did."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from chaos_databases import DatabaseUnderChaos
from chaos_disk import Disk
from chaos_fleet import Fleet, marked_processes
from chaos_plan import Act, Plan

KEEP_SECONDS = 0.05
AGAIN_SECONDS = 0.25  # until there is something that an act could be done to
Deed = Callable[[], str | None]


class Timeline:
    """What happened in a round, in order, in seconds since its beginning."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.lines: list[str] = []

    def tell(self, line: str) -> None:
        self.lines.append(f"{time.monotonic() - self._began:7.2f} {line}")


class Adversary:
    """Plays a plan against the servers of a round. What one act breaks, a later act of its own mends again."""

    def __init__(
        self, plan: Plan, fleet: Fleet, database: DatabaseUnderChaos, disk: Disk, gates: list[Path], timeline: Timeline
    ) -> None:
        self._fleet = fleet
        self._database = database
        self._disk = disk
        self._tell = timeline.tell
        self._seconds = plan.seconds
        self._gates = gates
        self._open_gates: list[int] = []
        self._order = itertools.count()  # acts of one moment happen in the order in which they were planned
        self._agenda: list[tuple[float, int, str, Deed]] = []
        for act in plan.acts:
            self._plan(act.at, f"{act.name} {act.target}".strip(), self._deed(act))
        for number, at in enumerate(plan.gates):
            self._plan(at, f"open gate {number}", lambda number=number: self._open(number))

    def play(self) -> None:
        """Until the last act, and then everything that could not mend itself is mended."""
        pause = threading.Event()
        self._began = time.monotonic()
        while self._agenda or time.monotonic() - self._began < self._seconds:
            self._fleet.keep()
            passed = time.monotonic() - self._began
            if not self._agenda or self._agenda[0][0] > passed:
                pause.wait(KEEP_SECONDS)
                continue
            _, _, name, deed = heapq.heappop(self._agenda)
            done = deed()
            if done is not None:
                self._tell(f"{name}: {done}")
            elif passed < self._seconds:
                self._plan(passed + AGAIN_SECONDS, name, deed)
            else:
                self._tell(f"{name}: there was none")
        self._disk.free()
        self._tell("the adversary leaves")

    def close(self) -> None:
        for fd in self._open_gates:
            os.close(fd)

    def _plan(self, at: float, name: str, deed: Deed) -> None:
        heapq.heappush(self._agenda, (at, next(self._order), name, deed))

    def _deed(self, act: Act) -> Deed:
        match act.name:
            case "kill worker":
                return lambda: _kill_one(self._fleet.workers(act.target), act.pick)
            case "kill fork server":
                return lambda: _kill_one(self._fleet.fork_servers(act.target), act.pick)
            case "kill server":
                return lambda: self._fleet.send(act.target, signal.SIGKILL)
            case "freeze":
                return lambda: self._freeze(act)
            case "fill the disk":
                return lambda: self._fill(act)
            case "jump":
                return lambda: self._jump(act.amount)
            case "restart the database":
                return self._database.restart
            case "kill a database process":
                return lambda: self._database.kill_backend(act.pick)
        raise AssertionError(f"no act is called {act.name!r}")

    def _freeze(self, act: Act) -> str | None:
        sent = self._fleet.send(act.target, signal.SIGSTOP)
        if sent is None:
            return None
        until = time.monotonic() - self._began + act.amount
        self._plan(until, f"thaw {act.target}", lambda: self._fleet.send(act.target, signal.SIGCONT) or "it is gone")
        return f"{sent} for {act.amount:.1f} s"

    def _fill(self, act: Act) -> str:
        self._plan(time.monotonic() - self._began + act.amount, "free the disk", self._free)
        return f"{self._disk.fill(marked_processes(self._fleet.run))} for {act.amount:.1f} s"

    def _free(self) -> str:
        self._disk.free()
        return "done"

    def _jump(self, seconds: float) -> str:
        self._database.jump(seconds)
        return f"{seconds:+.1f} s"

    def _open(self, number: int) -> str:
        fd = os.open(self._gates[number], os.O_RDWR | os.O_NONBLOCK)
        os.write(fd, b"x")
        self._open_gates.append(fd)  # kept open, or the byte would be lost with the last reader
        return "done"


def _kill_one(processes: list[psutil.Process], pick: float) -> str | None:
    if not processes:
        return None
    chosen = processes[int(pick * len(processes))]
    with contextlib.suppress(psutil.NoSuchProcess):
        chosen.kill()
    return f"killed {chosen.pid} of {len(processes)}"
