"""Kinds of jobs for the tests of single rules. They run in real worker processes, which import this module by name."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from artifacts.errors import RequestInvalid
from workers.context import JobContext, JobOutcome


def hold_the_gil(context: JobContext) -> JobOutcome:
    """Lets no other thread of its process run for `seconds`, as a long call into a library can."""
    began = time.monotonic()
    microseconds = int(context.params["seconds"] * 1e6)
    ctypes.PyDLL(None).usleep(microseconds)  # PyDLL: the lock is kept during the call
    return JobOutcome(report={"seconds": time.monotonic() - began})


def origin(context: JobContext) -> JobOutcome:
    """Where its process comes from."""
    report = {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "attempt": context.spec.attempt,
        "loaded": sorted({"torch", "workers.jobs.merge"} & sys.modules.keys()),
    }
    if context.spec.attempt <= context.params.get("crashes", 0):
        os.kill(os.getpid(), signal.SIGKILL)
    return JobOutcome(report=report)


def overstay(context: JobContext) -> JobOutcome:
    """Never ends by itself; says which process it is."""
    Path(context.params["note"]).write_text(str(os.getpid()))
    while True:
        signal.pause()
        context.check_cancelled()


def kill_server(context: JobContext) -> JobOutcome:
    """Kills the server that runs it: the parent of its fork server."""
    fork_server = Path(f"/proc/{os.getppid()}/stat").read_text(encoding="ascii")
    server = int(fork_server.rpartition(")")[2].split()[1])
    os.kill(server, signal.SIGKILL)
    while True:
        signal.pause()


def refuse(context: JobContext) -> JobOutcome:
    raise RequestInvalid("this can not be done")


KINDS = {
    function.__name__: f"rule_kinds:{function.__name__}"
    for function in (hold_the_gil, origin, overstay, kill_server, refuse)
}
