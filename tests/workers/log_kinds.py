"""Kinds of jobs that write to their log. They run in real worker processes, which import this module by its name."""

from __future__ import annotations

import os
import select
import signal
import sys
from pathlib import Path

import structlog

from workers.context import JobContext, JobOutcome

LINE = b"%011d\n"  # twelve bytes


def _wait(context: JobContext) -> None:
    context.progress(0.1, f"waiting in {os.getpid()}")
    gate = os.open(context.params["gate"], os.O_RDWR | os.O_NONBLOCK)
    try:
        while not select.select([gate], [], [], 0.01)[0]:
            context.check_cancelled()
    finally:
        os.close(gate)


def talk(context: JobContext) -> JobOutcome:
    """Says something in every way, waits for the gate, says goodbye."""
    print("printed: Grüße", flush=True)
    print("to standard error", file=sys.stderr, flush=True)
    structlog.get_logger("job").info("structured", number=7)
    os.write(1, b"raw \xff\x00 bytes\n")
    _wait(context)
    print("goodbye")
    return JobOutcome()


def silent(context: JobContext) -> JobOutcome:
    return JobOutcome()


def die_talking(context: JobContext) -> JobOutcome:
    """Is killed in its first attempt, in the middle of a line that Python has not flushed, behind one that it has."""
    print(f"attempt {context.spec.attempt}", flush=True)
    if context.spec.attempt == 1:
        os.write(1, b"about to be killed")
        os.kill(os.getpid(), signal.SIGKILL)
    return JobOutcome()


def flood(context: JobContext) -> JobOutcome:
    """Writes `lines` numbered lines of twelve bytes; waits for the gate if there is one."""
    for start in range(0, context.params["lines"], 1000):
        stop = min(start + 1000, context.params["lines"])
        os.write(1, b"".join(LINE % number for number in range(start, stop)))
    if "gate" in context.params:
        _wait(context)
    return JobOutcome()


def drop_blobs(context: JobContext) -> JobOutcome:
    """Talks, waits for the gate, then puts a file in the place of the blob store's folder."""
    print("before the outage", flush=True)
    _wait(context)
    folder = Path(context.params["blobs"])
    folder.rename(folder.with_suffix(".away"))
    folder.write_bytes(b"in the way")
    print("the store is gone")
    return JobOutcome()
