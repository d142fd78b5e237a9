"""The fork server: a process with torch loaded that forks worker processes and reaps them.

It is a child of the server, started as its own program, and single-threaded. Being the parent of the workers it knows
each one's exit status and peak memory, also of one that was killed; a worker that it has not reaped yet keeps its
process id, so a signal never reaches a stranger. `multiprocessing`'s own fork server hides these, imports the
server's main module into every child and swallows errors of the modules that it preloads.

Death follows from parent to child. The server's end, however it came, closes the control socket: the fork server then
kills every worker's process group and exits. If the fork server itself is killed, PR_SET_PDEATHSIG ends the workers,
and its guardian ends what they have started.

Protocol: JSON lines over a UNIX stream socket. In: {preload} first, then {fork, environment} with one file
descriptor each, and {signal, pid}. Out: loaded, forked, fork_failed, exited.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from typing import Any, NoReturn

from workers.guardian import Guardian

_PR_SET_PDEATHSIG = 1
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class ControlLostError(Exception):
    """The server has gone."""


def main(control_fd: int) -> None:
    """Serve until the server has gone."""
    server = ForkServer(socket.socket(fileno=control_fd))
    try:
        server.run()
    except ControlLostError:
        server.end_workers()


class ForkServer:
    """Forks on request, reaps, and tells of both."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._lines = LineReader()
        self._workers: set[int] = set()
        self._private_fds: tuple[int, ...] = ()
        self._guardian: Guardian | None = None

    def run(self) -> None:
        """Raises ControlLostError when the server has gone."""
        # A service manager may signal all processes of the service. The workers then stop at their next check;
        # this process must outlive them, to reap them.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        wake_read, wake_write = os.pipe()
        for fd in (wake_read, wake_write):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # Before anything is loaded: it stays as small as this process is now.
        self._guardian = Guardian((self._control.fileno(), wake_read, wake_write))
        self._preload()
        with selectors.PollSelector() as selector:
            self._private_fds = (self._control.fileno(), wake_read, wake_write, self._guardian.fd)
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(wake_read, selectors.EVENT_READ)
            while True:
                self._reap()
                self._handle_requests()
                for key, _ in selector.select():
                    if key.fd == wake_read:
                        with contextlib.suppress(BlockingIOError):
                            os.read(wake_read, 4096)
                    else:
                        self._receive()

    def end_workers(self) -> None:
        """Kill every process group that is left and reap its leader."""
        for pid in self._workers:
            _kill_group(pid)
            if self._guardian is not None:
                self._guardian.forget(pid)
        for pid in self._workers:
            os.waitpid(pid, 0)
        if self._guardian is not None:
            self._guardian.close()

    def _preload(self) -> None:
        while not self._lines.messages:
            self._receive()
        request, _ = self._lines.messages.popleft()
        began = time.monotonic()
        failed = {}
        for module in request["preload"]:
            try:
                importlib.import_module(module)
            except Exception:
                failed[module] = traceback.format_exc()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            failed["torch"] = "CUDA was initialised by a preloaded module; forked workers could not use it."
        gc.collect()
        gc.freeze()  # keeps the collector from touching, and so copying, pages that the workers share
        self._send(event="loaded", seconds=round(time.monotonic() - began, 3), failed=failed)

    def _receive(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._control, 65536, 16)
        except ConnectionError as error:
            raise ControlLostError from error
        if not data:
            raise ControlLostError
        self._lines.feed(data, fds)

    def _send(self, **message: Any) -> None:
        try:
            self._control.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise ControlLostError from error

    def _handle_requests(self) -> None:
        while self._lines.messages:
            request, fd = self._lines.messages.popleft()
            if fd is not None:
                self._fork(request["fork"], fd, request["environment"])
            elif request["pid"] in self._workers:
                self._signal(request["pid"], request["signal"])

    def _signal(self, pid: int, number: int) -> None:
        if number == signal.SIGKILL:
            _kill_group(pid)
        else:
            os.kill(pid, number)

    def _fork(self, token: int, channel_fd: int, environment: dict[str, str]) -> None:
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            os.close(channel_fd)
            self._send(event="fork_failed", token=token, error=str(error))
            return
        if pid == 0:
            _become_worker(parent, channel_fd, environment, self._private_fds)
        os.close(channel_fd)
        self._workers.add(pid)
        if self._guardian is not None:
            self._guardian.watch(pid)
        self._send(event="forked", token=token, pid=pid)

    def _reap(self) -> None:
        for pid in list(self._workers):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            # Not reaped yet, so the group's number still belongs to it: whatever it started ends with it.
            _kill_group(pid)
            if self._guardian is not None:
                self._guardian.forget(pid)
            _, status, usage = os.wait4(pid, 0)
            self._workers.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            self._send(
                event="exited",
                pid=pid,
                code=code if code >= 0 else None,
                signal=-code if code < 0 else None,
                peak_memory=usage.ru_maxrss * RSS_UNIT,
            )


class LineReader:
    """Splits a stream into JSON messages and hands each `fork` request its file descriptor, in order."""

    def __init__(self) -> None:
        self.messages: deque[tuple[dict[str, Any], int | None]] = deque()
        self._rest = b""
        self._fds: deque[int] = deque()

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> None:
        self._fds.extend(fds)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            self.messages.append((message, self._fds.popleft() if "fork" in message else None))


def _kill_group(pid: int) -> None:
    # A worker that was forked a moment ago may not lead a group yet: then it is alone.
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent` ends (Linux); exits at once if it already has."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(1)


def _become_worker(parent: int, channel_fd: int, environment: dict[str, str], private_fds: Sequence[int]) -> NoReturn:
    """Turn the forked child into a worker.

    It closes its copies of the fork server's descriptors: a control socket held open here would hide the fork
    server's death from the server.
    """
    status = 1
    try:
        os.setsid()
        die_with_parent(parent)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        for fd in private_fds:
            os.close(fd)
        os.environ.update(environment)
        runtime = importlib.import_module("workers.runtime")
        runtime.serve(channel_fd)
        status = 0
    except SystemExit:
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
