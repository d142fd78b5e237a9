"""Worker processes on a Ray cluster: the other implementation of the seam in `workers.provider`.

The server does not import Ray. A process of its own (`workers.ray_driver`) talks to the cluster; here are one thread
that takes in what it tells and one that sends it what the supervisor wants, so that no call waits for anything.
"""

from __future__ import annotations

import itertools
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

import structlog

from workers.attempt import AttemptSpec, Outcome
from workers.local import PRELOAD
from workers.provider import Slot, WorkerStartError
from workers.ray_messages import (
    Changed,
    Close,
    Connect,
    Connected,
    Nodes,
    Notice,
    Order,
    Plan,
    Seat,
    Start,
    Unreachable,
    Verb,
    WorkerState,
)
from workers.ray_slots import NODE_ID_SHOWN, SlotCatalogue, SlotRules
from workers.settlement import back_off

CLOSE_SECONDS = 30.0
KILL_SECONDS = 30.0  # the driver gives up on an actor long before
FIRST_RECONNECT_SECONDS = 1.0
WATCH_SECONDS = 1.0
OUTPUT_LINES = 20
PASSED_ON = ("AWS_", "GOOGLE_", "AZURE_")

log = structlog.get_logger(__name__)


class RayWorker:
    """A worker process on a node. The provider's thread writes its state, the supervisor reads it."""

    def __init__(self, number: int, seats: tuple[Seat, ...], notify: Callable[[], None], driver: DriverProcess) -> None:
        self.number = number
        self.seats = seats
        self.kill_asked_at: float | None = None
        self._notify = notify
        self._driver = driver
        self._state = WorkerState()
        self._attempts = 0
        self._peak_memory: int | None = None
        self._warm: tuple[str, ...] = ()
        self._discarded = False

    @property
    def pid(self) -> int | None:
        """Process id on the node."""
        return self._state.pid

    @property
    def ready(self) -> bool:
        return self._state.ready and self.alive()

    @property
    def host(self) -> str:
        """The beginning of the node's id."""
        return self.seats[0].node[:NODE_ID_SHOWN]

    @property
    def warm(self) -> tuple[str, ...]:
        return self._warm if self.alive() else ()

    def submit(self, spec: AttemptSpec) -> None:
        self._attempts += 1
        self._discarded = False
        self._order("submit", spec)

    def poll(self) -> Outcome | None:
        state = self._state
        return state.outcome if state.attempts == self._attempts else None

    def alive(self) -> bool:
        return self._state.ended is None

    def exit(self) -> dict[str, Any]:
        ended = self._state.ended
        if ended is None:
            return {"code": None, "signal": None, "peak_memory": self._peak_memory}
        return {**ended, "peak_memory": ended["peak_memory"] or self._peak_memory}

    def terminate(self) -> None:
        self._order("terminate")

    def kill(self) -> None:
        if self.alive() and self.kill_asked_at is None:
            self.kill_asked_at = time.monotonic()
            self._order("kill")

    def log_tail(self, lines: int = 200) -> list[str]:
        state = self._state
        if self._discarded or state.attempts != self._attempts:
            return []
        return list(state.log_tail[-lines:]) if lines > 0 else []

    def discard(self) -> None:
        if self._attempts and not self._discarded:
            self._discarded = True
            self._order("discard")

    def _order(self, verb: Verb, spec: AttemptSpec | None = None) -> None:
        # A discard is for the actor, which outlives the process.
        if self.alive() or verb == "discard":
            self._driver.send(Order(self.number, verb, spec))

    def on_changed(self, state: WorkerState) -> None:
        """Called by the thread that takes in what the driver tells."""
        if self._state.ended is not None:
            return
        if state.outcome is not None:
            self._peak_memory = state.outcome.peak_memory
            self._warm = state.outcome.warm
        self._state = state
        self._notify()

    def on_lost(self, why: str) -> None:
        """Nobody will hear of the process again. What it told before its end still counts."""
        ended = {"code": None, "signal": None, "peak_memory": None, "lost": why}
        self.on_changed(replace(self._state, ended=ended))


class DriverProcess:
    """A running `workers.ray_driver`, seen from the server."""

    def __init__(self, request: Connect, catalogue: SlotCatalogue, environment: Mapping[str, str]) -> None:
        self.connected = False
        self.refused: Unreachable | None = None
        self._catalogue = catalogue
        self._workers: dict[int, RayWorker] = {}
        self._numbers = itertools.count()
        self._lost = threading.Event()
        self._closing = False
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the process is reaped
        ours, theirs = socket.socketpair()
        with theirs:
            self._channel = Connection(ours.detach())
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter, with our own program
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), *sys.path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                # A Ctrl-C in the server's terminal must not reach it: the server stops it.
                start_new_session=True,
                env={**os.environ, **environment},
            )
        self.send(request)
        self._threads = [
            threading.Thread(target=self._take_in, name="ray-events", daemon=True),
            threading.Thread(target=self._send_out, name="ray-orders", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def lost(self) -> bool:
        """Whether the process has ended."""
        return self._lost.is_set()

    def start(self, seats: tuple[Seat, ...], notify: Callable[[], None]) -> RayWorker:
        worker = RayWorker(next(self._numbers), seats, notify, self)
        self._workers[worker.number] = worker
        self.send(Start(worker.number, seats))
        if self.lost:  # maybe too late for the thread that tells of the loss
            worker.on_lost(_CONNECTION_LOST)
        return worker

    def send(self, message: Any) -> None:
        """Never waits, and does nothing when the process has ended."""
        self._outgoing.put(message)

    def close(self) -> None:
        """End the process, and with it every actor and worker."""
        self._closing = True
        if not self.connected:  # it waits for the cluster, not for us
            self._process.kill()
        self.send(Close())
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        for thread in self._threads:
            thread.join()

    def _send_out(self) -> None:
        while (message := self._outgoing.get()) is not None:
            try:
                self._channel.send(message)
            except OSError:
                return  # it has ended; the other thread tells

    def _take_in(self) -> None:
        try:
            while True:
                if self._channel.poll(WATCH_SECONDS):
                    self._take(self._channel.recv())
                self._enforce_kills()
        except (EOFError, OSError):
            pass
        finally:
            self._bury()

    def _take(self, message: Any) -> None:
        match message:
            case Changed():
                worker = self._workers.get(message.worker)
                if worker is not None:
                    if message.state.ended is not None:
                        del self._workers[message.worker]
                    worker.on_changed(message.state)
            case Nodes():
                self._catalogue.update(message.nodes)
                log.info("ray_nodes", nodes=len(message.nodes), slots=len(self._catalogue.slots))
            case Connected():
                self.connected = True
                log.info("ray_connected", address=message.address, pid=self.pid)
            case Unreachable():
                self.refused = message
            case Notice():
                log.log(_LEVELS[message.level], message.event, **message.fields)

    def _enforce_kills(self) -> None:
        """A driver that does not even get its actor killed hangs: end it, and all workers with it."""
        latest = time.monotonic() - KILL_SECONDS
        if any(worker.kill_asked_at and worker.kill_asked_at < latest for worker in list(self._workers.values())):
            log.error("ray_driver_hangs", pid=self.pid)
            self._process.kill()

    def _bury(self) -> None:
        """Reap it, and tell that its workers are lost."""
        self._process.kill()
        code = self._process.wait()
        self._lost.set()
        self._channel.close()
        self._outgoing.put(None)
        self._catalogue.update(())
        if self.refused is not None:
            log.error("ray_unreachable", detail=self.refused.detail, hint=self.refused.hint)
        elif not self._closing:
            log.error("ray_driver_lost", pid=self.pid, code=code, output=self._last_output())
        self._output.close()
        for worker in list(self._workers.values()):
            worker.on_lost(_CONNECTION_LOST)
        self._workers.clear()

    def _last_output(self) -> list[str]:
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - 16_384))
        return self._output.read().decode("utf-8", errors="replace").splitlines()[-OUTPUT_LINES:]


class RayProvider:
    """Worker processes on a Ray cluster: each slot is a place on a node, held by an actor while it is used.

    Args:
        address: "auto", "<head>:6379" on a machine that is a node itself, or "ray://<head>:10001" from anywhere.
        rules: how the nodes' resources become slots.
        work_dir: folder on each node for scratch, cache and logs; None: one of this user's among the temporary files.
        preload: modules that each fork server imports.
    """

    def __init__(
        self,
        address: str = "auto",
        rules: SlotRules | None = None,
        *,
        work_dir: str | None = None,
        preload: Sequence[str] = PRELOAD,
    ) -> None:
        plan = Plan(
            version=version("rankwise"),
            resources={},
            devices=0,
            threads=1,
            work_dir=work_dir,
            preload=tuple(preload),
            environment={name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)},
        )
        self._request = Connect(address, plan)
        self._catalogue = SlotCatalogue(rules or SlotRules())
        self._driver: DriverProcess | None = None
        self._failures = 0
        self._retry_at = 0.0
        self._closed = False

    def slots(self) -> tuple[Slot, ...]:
        """The slots of the nodes that live now; none while the cluster does not answer."""
        self._running_driver()
        return self._catalogue.slots

    def start(self, slots: Sequence[Slot], notify: Callable[[], None]) -> RayWorker:
        driver = self._running_driver()
        if driver is None:
            raise WorkerStartError("the Ray cluster can not be reached")
        found = [self._catalogue.seat(slot.name) for slot in slots]
        seats = tuple(seat for seat in found if seat is not None)
        if len(seats) < len(slots):
            raise WorkerStartError("the Ray node of the slot is gone")
        if len({seat.node for seat in seats}) != 1:
            raise WorkerStartError("the slots of one worker must be on one Ray node")
        if len(seats) > 1 and 0 < seats[0].resources.get("GPU", 0) < 1:
            raise WorkerStartError("slots that share a GPU can not serve one job together")
        return driver.start(seats, notify)

    def close(self) -> None:
        self._closed = True
        if self._driver is not None:
            self._driver.close()
            self._driver = None

    def _running_driver(self) -> DriverProcess | None:
        """The driver; one that has ended is replaced after a pause that grows with each failure in a row."""
        now = time.monotonic()
        if self._driver is not None and self._driver.connected:
            self._failures = 0
        if self._driver is not None and self._driver.lost:
            self._driver.close()
            self._driver = None
            self._failures += 1
            self._retry_at = now + back_off(self._failures, FIRST_RECONNECT_SECONDS)
        if self._driver is None and now >= self._retry_at and not self._closed:
            self._driver = DriverProcess(self._request, self._catalogue, _driver_environment())
        return self._driver


_CONNECTION_LOST = "the connection to the Ray cluster was lost"
_LEVELS = {"info": 20, "warning": 30, "error": 40}
# It sees the same packages as the server, however that was started.
_PROGRAM = (
    "import sys; channel = int(sys.argv[1]); sys.path[:] = sys.argv[2:]; sys.argv[1:] = []; "
    "from workers.ray_driver import main; sys.exit(main(channel))"
)


def _driver_environment() -> dict[str, str]:
    """What the driver's environment has beside the server's. A token that is given is meant to be used."""
    environment = {"RAY_USAGE_STATS_ENABLED": "0"}
    given = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if given and "RAY_AUTH_MODE" not in os.environ:
        environment["RAY_AUTH_MODE"] = "token"
    return environment
