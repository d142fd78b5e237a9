"""A service of its own in a child process: what the demonstration talks to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from app.cli.client import ProblemError

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 60.0
STOP_SECONDS = 45.0
POLL_SECONDS = 0.1
LOG_LINES = 15
# What the caller's environment may still decide; any other RANKWISE_ variable would point at another service's data.
KEPT = ("RANKWISE_DEVICES", "RANKWISE_MODEL_CACHE")


class ServerError(ProblemError):
    """The service did not start; `hint` holds the end of its log."""

    def __init__(self, detail: str, hint: str) -> None:
        super().__init__({"code": "server_failed", "detail": detail, "hint": hint})


class ServerProcess:
    """`rankwise serve` on a free port of loopback, with its own data folder. A context manager.

    Leaving it stops the service: SIGTERM, and SIGKILL for the whole process group when that is not enough.
    """

    def __init__(self, data_dir: Path, settings: Mapping[str, str], log: Path) -> None:
        self._settings = {"DATA_DIR": str(data_dir), "HOST": "127.0.0.1", **settings}
        self._log_path = log
        self._log: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def __enter__(self) -> ServerProcess:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("RANKWISE_") or name in KEPT
        }
        environment |= {f"RANKWISE_{name}": value for name, value in self._settings.items()}
        environment["RANKWISE_PORT"] = str(port)
        self._log = self._log_path.open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "serve"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self._await_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The process id of the service while it runs."""
        assert self._process is not None
        return self._process.pid

    def wait(self) -> int:
        """Wait until the service ends by itself and return its exit code."""
        assert self._process is not None
        return self._process.wait()

    def stop(self) -> None:
        """End the service and everything that it started; does nothing when it has ended."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if self._log is not None:
            self._log.close()

    def _await_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            code = self._process.poll()
            if code is not None:
                raise ServerError(f"the service ended with exit code {code} while starting", hint=self._tail())
            if _is_ready(self.url):
                return
            time.sleep(POLL_SECONDS)
        raise ServerError(f"the service was not ready within {START_SECONDS:.0f} seconds", hint=self._tail())

    def _tail(self) -> str:
        lines = self._log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        return f"the end of {self._log_path}:\n" + "\n".join(lines)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:  # noqa: S310 (loopback)
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _free_port() -> int:
    """A port that is free now. Another program could take it before the service does; the start then fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
