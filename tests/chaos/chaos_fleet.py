"""The servers of a round: real processes, and what watches over them as a service manager would."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from chaos_plan import SERVERS, SLOTS

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = Path(__file__).with_name("chaos_server.py")
RUN = "RANKWISE_CHAOS_RUN"
SERVER = "RANKWISE_CHAOS_SERVER"
GUARDIAN = "guardian"  # of a fork server: it only waits, and killing it does nothing as long as that lives


@dataclass
class Server:
    """One of `rankwise serve` and `rankwise worker`: its process, if it has one now, and when it is started again."""

    name: str
    command: str
    environment: dict[str, str]
    log: Path
    downs: Iterator[float]
    process: subprocess.Popen[bytes] | None = None
    start_at: float = 0.0
    starts: int = 0
    codes: list[int] = field(default_factory=list)


class Fleet:
    """All servers of a round.

    Args:
        run: what marks the processes of this round in their environment.
        settings: as `Settings` has them, the same for all.
        tell: is given what happens, for the round's timeline.
    """

    def __init__(
        self,
        run: str,
        folder: Path,
        logs: Path,
        settings: Mapping[str, str],
        restart_after: Mapping[str, tuple[float, ...]],
        tell: Callable[[str], None],
    ) -> None:
        self.run = run
        self._tell = tell
        self._lock = threading.Lock()
        self._keeping = False
        locks = folder / "locks"
        locks.mkdir()
        self.port = _free_port()
        self.servers: dict[str, Server] = {}
        for name in SERVERS:
            own = {"DATA_DIR": str(folder / name), "DEVICES": f"cpu:{SLOTS}", "PORT": str(self.port)}
            environment = {key: value for key, value in os.environ.items() if not key.startswith("RANKWISE_")}
            environment |= {f"RANKWISE_{key}": value for key, value in {**settings, **own}.items()}
            environment |= {RUN: run, SERVER: name, "RANKWISE_CHAOS_LOCKS": str(locks)}
            environment["PYTHONPATH"] = os.pathsep.join([str(LAUNCHER.parent), str(ROOT)])
            environment["PYTHONDONTWRITEBYTECODE"] = "1"  # a full disk must not leave half a file for the next import
            command = "serve" if name == SERVERS[0] else "worker"
            downs = _for_ever(restart_after[name])
            self.servers[name] = Server(name, command, environment, logs / f"{name}.log", downs)
        self.data_dirs = [folder / name for name in SERVERS]
        self.locks = locks

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start all, and keep them running."""
        with self._lock:
            self._keeping = True
            for server in self.servers.values():
                self._start(server)

    def keep(self) -> None:
        """Start again what has ended, each after its pause. Called again and again."""
        with self._lock:
            for server in self.servers.values() if self._keeping else ():
                if server.process is not None and server.process.poll() is not None:
                    code = server.process.wait()
                    server.codes.append(code)
                    server.process = None
                    server.start_at = time.monotonic() + next(server.downs)
                    self._tell(f"{server.name} has ended with {code}")
                if server.process is None and time.monotonic() >= server.start_at:
                    self._start(server)

    def _start(self, server: Server) -> None:
        with server.log.open("ab") as log:
            server.process = subprocess.Popen(
                [sys.executable, LAUNCHER, server.command],
                cwd=ROOT,
                env=server.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        server.starts += 1
        self._tell(f"{server.name} starts as {server.process.pid}")

    def send(self, name: str, number: signal.Signals) -> str | None:
        """Signal the server's own process; tells to whom, or None when it is down."""
        with self._lock:
            process = self.servers[name].process
            if process is None or process.poll() is not None:
                return None
            process.send_signal(number)
            return f"{number.name} to {process.pid}"

    def fork_servers(self, name: str) -> list[psutil.Process]:
        return [process for process in self._children(name) if "workers.forkserver" in " ".join(_command(process))]

    def workers(self, name: str) -> list[psutil.Process]:
        """The worker processes of a server, also one that runs nothing, with their ranks and children."""
        found = []
        for parent in self.fork_servers(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                found += parent.children(recursive=True)
        return sorted((process for process in found if _name(process) != GUARDIAN), key=lambda process: process.pid)

    def _children(self, name: str) -> list[psutil.Process]:
        process = self.servers[name].process
        if process is None:
            return []
        try:
            return psutil.Process(process.pid).children()
        except psutil.NoSuchProcess:
            return []

    def stop(self, patience: float) -> list[str]:
        """Stop all as a service manager does: SIGTERM, and SIGKILL for what stays; tells what stayed."""
        with self._lock:
            self._keeping = False
            running = [server for server in self.servers.values() if server.process is not None]
            for server in running:
                assert server.process is not None
                server.process.send_signal(signal.SIGTERM)
            stayed = []
            deadline = time.monotonic() + patience
            for server in running:
                assert server.process is not None
                try:
                    server.codes.append(server.process.wait(max(0.1, deadline - time.monotonic())))
                except subprocess.TimeoutExpired:
                    stayed.append(f"{server.name} ({server.process.pid}) did not stop within {patience:g} s of SIGTERM")
                    server.process.kill()
                    server.process.wait()
                server.process = None
            return stayed

    def destroy(self) -> None:
        """Kill whatever carries the mark of this round, also what is stopped; for the end of a failed one."""
        with self._lock:
            self._keeping = False
            for server in self.servers.values():
                if server.process is not None:
                    server.process.kill()
                    server.process.wait()
                    server.process = None
            for process in marked_processes(self.run):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def strangers(self) -> list[psutil.Process]:
        """Processes of this round that belong to no server that runs now."""
        marked = marked_processes(self.run)  # first: what is forked after it can not be missing among the known
        known: set[int] = set()
        for server in self.servers.values():
            if server.process is not None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    parent = psutil.Process(server.process.pid)
                    known |= {parent.pid, *(child.pid for child in parent.children(recursive=True))}
        return [process for process in marked if process.pid not in known and _is_alive(process)]


def marked_processes(run: str) -> list[psutil.Process]:
    """All processes, wherever in the tree, that were started with the mark of this round and have not ended."""
    mark = f"{RUN}={run}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(psutil.Process(int(folder.name)))
    return [process for process in found if _is_alive(process)]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def _for_ever(seconds: tuple[float, ...]) -> Iterator[float]:
    while True:
        yield from seconds
