"""Worker processes on this machine: a long-lived one for each slot, forked by a process that has torch loaded."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import structlog

from workers.attempt import AttemptSpec, Outcome
from workers.devices import threads_per_slot, worker_environment
from workers.forkserver import LineReader
from workers.log_shipping import LogKeeper
from workers.logs import read_tail
from workers.provider import Slot, WorkerStartError

PRELOAD = ("torch", "workers.runtime", "workers.jobs.merge", "merge.methods.lego")
FORKSERVER_EXIT_SECONDS = 15.0
LOG_SECONDS = 5.0  # for the logs that are not in the blob store yet, when the provider is closed
HOST = socket.gethostname()

log = structlog.get_logger(__name__)


class LocalWorker:
    """A worker process of the fork server. The event thread writes its state, the supervisor reads it."""

    def __init__(
        self, slots: Sequence[Slot], notify: Callable[[], None], channel: Connection, forkserver: ForkServerProcess
    ) -> None:
        self.slots = tuple(slots)
        self.channel = channel
        self._notify = notify
        self._forkserver = forkserver
        self._lock = threading.Lock()
        self._pid: int | None = None
        self._process: psutil.Process | None = None
        self._ready = False
        self._kill_wanted = False
        self._outcome: Outcome | None = None
        self._peak_memory: int | None = None
        self._ended: dict[str, Any] | None = None
        self._spec: AttemptSpec | None = None
        self._warm: tuple[str, ...] = ()

    @property
    def pid(self) -> int | None:
        return self._pid

    @property
    def ready(self) -> bool:
        return self._ready and self._ended is None

    @property
    def host(self) -> str:
        return HOST

    @property
    def warm(self) -> tuple[str, ...]:
        return self._warm if self._ended is None else ()

    def submit(self, spec: AttemptSpec) -> None:
        """Hand the attempt to the process. If that has just died, `alive` tells."""
        self._spec = spec
        self._outcome = None
        with contextlib.suppress(OSError):
            self.channel.send(spec)

    def poll(self) -> Outcome | None:
        return self._outcome

    def alive(self) -> bool:
        return self._ended is None

    def exit(self) -> dict[str, Any]:
        if self._ended is not None:
            return self._ended
        return {"code": None, "signal": None, "peak_memory": self._peak_memory}

    def terminate(self) -> None:
        self._send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self._kill_wanted = True
        self._send_signal(signal.SIGKILL)

    def log_tail(self, lines: int = 200) -> list[str]:
        return read_tail(Path(self._spec.log), lines) if self._spec is not None and self._spec.log else []

    def discard(self) -> None:
        spec = self._spec
        if spec is not None and spec.log:
            self._forkserver.logs.keep(Path(spec.log), spec.database_url, spec.blob_url)

    def _send_signal(self, number: signal.Signals) -> None:
        if self._pid is not None and self._ended is None:
            self._forkserver.request(pid=self._pid, signal=int(number))

    # The rest is called by the event thread.

    def on_forked(self, pid: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self._process = psutil.Process(pid)
        self._pid = pid
        if self._kill_wanted:  # asked for before the process existed
            self.kill()

    def on_message(self, message: Outcome | str) -> None:
        if isinstance(message, Outcome):
            self._peak_memory = message.peak_memory
            self._warm = message.warm
            self._outcome = message
        else:
            self._ready = True
        self._notify()

    def on_ended(self, code: int | None, signal_number: int | None, peak_memory: int | None) -> None:
        """The process has been reaped. Its attempt's scratch goes; whoever publishes has a copy."""
        with self._lock:
            if self._ended is not None:
                return
            self.channel.close()
            if self._spec is not None:
                shutil.rmtree(self._spec.scratch, ignore_errors=True)
            self._ended = {"code": code, "signal": signal_number, "peak_memory": peak_memory or self._peak_memory}
        self._notify()

    def on_orphaned(self) -> None:
        """The fork server is gone, so the kernel kills this process; wait until it has."""
        if self._process is not None:
            # Also when it has ended already: what its job has started is in its group, and may be left.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            psutil.wait_procs([self._process], timeout=FORKSERVER_EXIT_SECONDS)
        self.on_ended(None, int(signal.SIGKILL), None)


class ForkServerProcess:
    """A running fork server, seen from the server: requests go out, one thread takes in what happens."""

    def __init__(self, preload: Sequence[str], threads: int, logs: LogKeeper) -> None:
        self.logs = logs
        self._tokens = itertools.count()
        self._workers: dict[int, LocalWorker] = {}
        self._by_pid: dict[int, LocalWorker] = {}
        self._send_lock = threading.Lock()
        self._lost = threading.Event()
        ours, theirs = socket.socketpair()
        with theirs:
            self._control = ours
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter, with our own program
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), *sys.path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # A Ctrl-C in the server's terminal must not reach the workers: the server stops them.
                start_new_session=True,
                env=_thread_environment(threads),
            )
        self.request(preload=list(preload))
        self._thread = threading.Thread(target=self._take_in, name="worker-events", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether the fork server has ended."""
        return self._lost.is_set()

    @property
    def pid(self) -> int:
        return self._process.pid

    def fork(self, slots: Sequence[Slot], notify: Callable[[], None]) -> LocalWorker:
        """Ask for a worker process.

        Raises:
            WorkerStartError: the fork server has ended.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            token = next(self._tokens)
            worker = LocalWorker(slots, notify, Connection(ours.detach()), self)
            self._workers[token] = worker
            line = json.dumps({"fork": token, "environment": worker_environment(slots)}).encode() + b"\n"
            try:
                with self._send_lock:
                    socket.send_fds(self._control, [line], [theirs.fileno()])
            except OSError as error:
                worker.on_ended(None, None, None)
                raise WorkerStartError("the fork server has ended") from error
        return worker

    def request(self, **message: Any) -> None:
        """Send a request without a file descriptor. If the fork server is gone, `lost` tells."""
        with contextlib.suppress(OSError), self._send_lock:
            self._control.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        """End the fork server, and with it every worker."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        self._thread.join(FORKSERVER_EXIT_SECONDS)
        if self._thread.is_alive():  # it hangs, in the import of a module
            self._process.kill()
            self._thread.join()

    def _take_in(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._control, selectors.EVENT_READ)
                self._serve(selector)
        finally:  # whatever ended it, nobody will hear of these workers again
            self._lost.set()
            self._bury()

    def _serve(self, selector: selectors.BaseSelector) -> None:
        lines = LineReader()
        while True:
            for key, _ in selector.select():
                if key.data is not None:
                    self._take_message(selector, key.data)
                    continue
                try:
                    data = self._control.recv(65536)
                except OSError:
                    return
                if not data:
                    return
                lines.feed(data)
                while lines.messages:
                    self._on_event(selector, lines.messages.popleft()[0])

    def _take_message(self, selector: selectors.BaseSelector, worker: LocalWorker) -> None:
        if worker.channel.closed:  # its end came in the same batch of events, and before this one
            return
        try:
            message = worker.channel.recv()
        except (EOFError, OSError):
            selector.unregister(worker.channel)  # it ends, by itself: how, the fork server will tell
            return
        worker.on_message(message)

    def _on_event(self, selector: selectors.BaseSelector, event: dict[str, Any]) -> None:
        match event["event"]:
            case "loaded":
                for module, trace in event["failed"].items():
                    log.error("preload_failed", module=module, traceback=trace)
                log.info("fork_server_ready", pid=self.pid, seconds=event["seconds"])
            case "forked":
                worker = self._workers[event["token"]]
                self._by_pid[event["pid"]] = worker
                selector.register(worker.channel, selectors.EVENT_READ, worker)
                worker.on_forked(event["pid"])
            case "fork_failed":
                log.error("fork_failed", error=event["error"])
                self._forget(self._workers[event["token"]])[1].on_ended(None, None, None)
            case "exited":
                worker = self._by_pid.pop(event["pid"])
                self._drain(selector, worker)
                self._forget(worker)
                worker.on_ended(event["code"], event["signal"], event["peak_memory"])

    def _drain(self, selector: selectors.BaseSelector, worker: LocalWorker) -> None:
        """What a worker sent before it ended counts. Its end of the channel may live on in what it forked."""
        while worker.channel in selector.get_map() and worker.channel.poll():
            self._take_message(selector, worker)
        if worker.channel in selector.get_map():
            selector.unregister(worker.channel)

    def _forget(self, worker: LocalWorker) -> tuple[int, LocalWorker]:
        token = next(token for token, item in self._workers.items() if item is worker)
        return token, self._workers.pop(token)

    def _bury(self) -> None:
        """Both ends are closed: reap the fork server and make sure that no worker is left."""
        self._control.close()
        try:
            self._process.wait(FORKSERVER_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for worker in list(self._workers.values()):
            worker.on_orphaned()
        self._workers.clear()


class LocalProvider:
    """Worker processes on this machine. A fork server that has died is replaced by the next `start`.

    Args:
        slots: the device slots of this machine.
        preload: modules that the fork server imports before it forks.
        threads: threads for the numeric libraries of each worker.
    """

    def __init__(
        self, slots: Sequence[Slot] = (), *, preload: Sequence[str] = PRELOAD, threads: int | None = None
    ) -> None:
        self._slots = tuple(slots)
        self._preload = tuple(preload)
        self._threads = threads_per_slot(len(self._slots)) if threads is None else threads
        self._forkserver: ForkServerProcess | None = None
        self.logs = LogKeeper()

    def slots(self) -> tuple[Slot, ...]:
        return self._slots

    def start(self, slots: Sequence[Slot], notify: Callable[[], None]) -> LocalWorker:
        if self._forkserver is None or self._forkserver.lost:
            if self._forkserver is not None:
                log.error("fork_server_lost", pid=self._forkserver.pid)
                self._forkserver.close()
            try:
                self._forkserver = ForkServerProcess(self._preload, self._threads, self.logs)
            except OSError as error:
                self._forkserver = None
                raise WorkerStartError(f"the fork server could not be started: {error}") from error
        return self._forkserver.fork(slots, notify)

    def close(self) -> None:
        if self._forkserver is not None:
            self._forkserver.close()
            self._forkserver = None
        self.logs.flush(LOG_SECONDS)


# The fork server sees the same packages as the server, however that was started.
_PROGRAM = (
    "import sys; control = int(sys.argv[1]); sys.path[:] = sys.argv[2:]; sys.argv[1:] = []; "
    "from workers.forkserver import main; main(control)"
)


def _thread_environment(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads)), "TOKENIZERS_PARALLELISM": "false"}
