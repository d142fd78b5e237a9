"""The kinds of jobs of the chaos rounds. They run in real worker processes, which import this module by its name.

Every one of them takes the lock of its device slot while it runs: two processes on one slot at the same time would
mean that a slot was given away before its process was gone.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import chaos_clock
from chaos_plan import SLOTS
from sqlalchemy.pool import Pool

from artifacts.errors import FieldError, RequestInvalid
from workers.context import JobContext, JobOutcome

Job = Callable[[JobContext], JobOutcome]

chaos_clock.follow_from_environment(Pool)  # before the worker opens its database


@contextmanager
def slot_lock(context: JobContext, slot: str) -> Iterator[None]:
    """Hold the slot's lock; if another process holds it, write that down for the invariants and go on."""
    folder = Path(os.environ["RANKWISE_CHAOS_LOCKS"])
    server = os.environ["RANKWISE_CHAOS_SERVER"]
    spec = context.spec
    with (folder / f"{server}-{slot}.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # An empty file, which a full disk has room for.
            (folder / f"{spec.job_id}-{spec.attempt}-{server}-{slot}.conflict").touch()
        yield


def on_slot(function: Job) -> Job:
    @functools.wraps(function)
    def run(context: JobContext) -> JobOutcome:
        with ExitStack() as locks:
            if context.rank == 0:
                # A server has as many slots as a job may have devices here.
                taken = [context.spec.slot] if context.world_size == 1 else [f"cpu:{n}" for n in range(SLOTS)]
                for slot in taken:
                    locks.enter_context(slot_lock(context, slot))
            outcome = function(context)
        # Whose result it is, so that one of an attempt that counted no more is found out.
        return replace(outcome, report={**outcome.report, "attempt": context.spec.attempt})

    return run


def pause(context: JobContext, seconds: float) -> None:
    """Wait, and stop early when asked to."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        context.check_cancelled()
        select.select([], [], [], min(0.02, max(0.0, until - time.monotonic())))


@on_slot
def quiet(context: JobContext) -> JobOutcome:
    return JobOutcome()


@on_slot
def chatty(context: JobContext) -> JobOutcome:
    for number in range(int(context.params["lines"])):
        print(f"{context.spec.job_id} line {number}")
    os.write(2, b"written past Python\n")
    return JobOutcome(report={"lines": context.params["lines"]})


@on_slot
def steps(context: JobContext) -> JobOutcome:
    total = int(context.params["steps"])
    for step in range(1, total + 1):
        context.progress(step / total, f"step {step}", step, total)
        pause(context, 0.1)
    return JobOutcome(report={"steps": total})


@on_slot
def slow(context: JobContext) -> JobOutcome:
    pause(context, float(context.params["seconds"]))
    return JobOutcome()


@on_slot
def gated(context: JobContext) -> JobOutcome:
    """Waits until somebody writes to the FIFO `gate`."""
    context.progress(0.1, "waits for its gate")
    gate = os.open(context.params["gate"], os.O_RDWR | os.O_NONBLOCK)
    try:
        while not select.select([gate], [], [], 0.05)[0]:
            context.check_cancelled()
    finally:
        os.close(gate)
    return JobOutcome()


@on_slot
def crash_once(context: JobContext) -> JobOutcome:
    if context.spec.attempt == 1:
        print("about to crash", flush=True)
        os.kill(os.getpid(), context.params["signal"])
    return JobOutcome()


@on_slot
def crash_always(context: JobContext) -> JobOutcome:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


@on_slot
def infrastructure_once(context: JobContext) -> JobOutcome:
    if context.spec.attempt == 1:
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/file")
    return JobOutcome()


@on_slot
def device_memory(context: JobContext) -> JobOutcome:
    """Needs more of the device's memory than there is, unless it is told to use less."""
    if context.params["always"] or not context.reduce_memory:
        raise RuntimeError("CUDA error: out of memory")
    return JobOutcome(report={"reduced": True})


@on_slot
def user_error(context: JobContext) -> JobOutcome:
    raise RequestInvalid("weight is -1", hint="Use another weight.", errors=[FieldError("/weight", "negative")])


@on_slot
def stubborn(context: JobContext) -> JobOutcome:
    """Ignores SIGTERM, never looks whether it shall stop, and has a child that does the same in its process group."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    program = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); sys.stdin.read()"
    reader, writer = os.pipe()  # the child holds both ends, so that only a signal ends it
    child = subprocess.Popen([sys.executable, "-c", program], stdin=reader, pass_fds=[writer], stdout=subprocess.PIPE)
    os.close(reader)
    os.close(writer)
    assert child.stdout is not None
    child.stdout.readline()
    until = time.monotonic() + float(context.params["seconds"])
    while time.monotonic() < until:
        select.select([], [], [], 0.05)
    child.kill()
    child.wait()
    child.stdout.close()
    signal.signal(signal.SIGTERM, before)
    return JobOutcome()


@on_slot
def all_reduce(context: JobContext) -> JobOutcome:
    """On several devices: every rank adds its number, again and again."""
    import torch
    from torch import distributed

    value = torch.zeros(1, device=context.device)
    for _ in range(int(context.params["turns"])):
        value = torch.tensor([float(context.rank + 1)], device=context.device)
        distributed.all_reduce(value)
        pause(context, 0.1)
    return JobOutcome(report={"sum": value.item()})


@on_slot
def merge(context: JobContext) -> JobOutcome:
    """The real merge."""
    from workers.jobs import merge as real

    return real.run(context)


FUNCTIONS = (
    quiet,
    chatty,
    steps,
    slow,
    gated,
    crash_once,
    crash_always,
    infrastructure_once,
    device_memory,
    user_error,
    stubborn,
    all_reduce,
    merge,
)
KINDS = {function.__name__: f"chaos_kinds:{function.__name__}" for function in FUNCTIONS}
