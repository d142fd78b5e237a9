"""Kinds of jobs for the tests of the pool. They run in real worker processes, which import this module by its name."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from artifacts.errors import BlobStoreUnavailable, FieldError, RequestInvalid
from workers.context import JobContext, JobOutcome


def succeed(context: JobContext) -> JobOutcome:
    print("working on", context.spec.job_id)
    context.progress(0.5, "half way", 1, 2)
    report = {
        "pid": os.getpid(),
        "attempt": context.spec.attempt,
        "device": context.device,
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "omp_threads": os.environ.get("OMP_NUM_THREADS"),
        "scratch": str(context.scratch),
        "reduce_memory": context.reduce_memory,
        "session": os.getsid(0),
    }
    return JobOutcome(report=report)


def user_error(context: JobContext) -> JobOutcome:
    raise RequestInvalid("weight is -1", hint="Use another weight.", errors=[FieldError("/weight", "negative")])


def bug(context: JobContext) -> JobOutcome:
    for number in range(300):
        print(f"line {number}")
    os.write(2, b"written past Python\0\n")
    return JobOutcome(report={"x": {}["absent"]})


def exits(context: JobContext) -> JobOutcome:
    os._exit(int(context.params["code"]))


def crash(context: JobContext) -> JobOutcome:
    """Dies by a signal in its first `times` attempts."""
    if context.spec.attempt <= context.params["times"]:
        print("about to crash", flush=True)
        os.kill(os.getpid(), context.params.get("signal", signal.SIGKILL))
    return JobOutcome(report={"attempt": context.spec.attempt})


def infrastructure(context: JobContext) -> JobOutcome:
    """Meets a failure of its surroundings in its first attempt."""
    if context.spec.attempt == 1:
        if context.params["cause"] == "disk":
            raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/file")
        raise BlobStoreUnavailable("the store does not answer")
    return JobOutcome(report={"attempt": context.spec.attempt})


def device_memory(context: JobContext) -> JobOutcome:
    """Runs out of the device's memory unless it is told to use less, or always."""
    if context.params.get("always") or not context.reduce_memory:
        raise RuntimeError("CUDA error: out of memory")
    return succeed(context)


def big_memory(context: JobContext) -> JobOutcome:
    """Touches `bytes` of memory, then ends as `then` says."""
    block = b"x" * context.params["bytes"]
    if len(block) and context.params["then"] == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    raise RequestInvalid("after using memory")


def wait_for_gate(context: JobContext) -> JobOutcome:
    """Tells that it runs, then waits until somebody writes to the FIFO `gate`; stops when it is asked to."""
    context.progress(0.1, f"waiting in {os.getpid()}")
    gate = os.open(context.params["gate"], os.O_RDWR | os.O_NONBLOCK)
    try:
        while not select.select([gate], [], [], 0.01)[0]:
            context.check_cancelled()
    finally:
        os.close(gate)
    return JobOutcome(report={"pid": os.getpid(), "attempt": context.spec.attempt})


def wait_once(context: JobContext) -> JobOutcome:
    """Waits in its first attempt only."""
    if context.spec.attempt == 1:
        return wait_for_gate(context)
    return JobOutcome(report={"attempt": context.spec.attempt})


def stubborn(context: JobContext) -> JobOutcome:
    """Ignores SIGTERM in its first attempt, and has a child in its process group."""
    if context.spec.attempt > 1:
        return JobOutcome(report={"attempt": context.spec.attempt})
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(context.params["child"]).write_text(str(_start_child()))
    context.progress(0.1, f"waiting in {os.getpid()}")
    while True:
        signal.pause()


def _start_child() -> int:
    """A process that ignores SIGTERM and holds both ends of its own input, so that only a SIGKILL ends it."""
    program = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); sys.stdin.read()"
    reader, writer = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=reader, pass_fds=[writer], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.readline()  # it ignores SIGTERM from here on
    return child.pid


def crash_with_child(context: JobContext) -> JobOutcome:
    """Dies while a child of its own still runs."""
    Path(context.params["child"]).write_text(str(_start_child()))
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def deaf_then_succeed(context: JobContext) -> JobOutcome:
    """Never looks whether it shall stop; ends when the gate opens."""
    context.progress(0.1, f"waiting in {os.getpid()}")
    with Path(context.params["gate"]).open("rb", buffering=0) as gate:
        gate.read(1)
    return JobOutcome(report={"attempt": context.spec.attempt})


def steps(context: JobContext) -> JobOutcome:
    """Tells its progress at every turn until it is stopped by what that raises."""
    number = 0
    while True:
        number += 1
        context.progress(0.5, f"step {number} in {os.getpid()}")
        select.select([], [], [], 0.01)


def loaded(context: JobContext) -> JobOutcome:
    """Reports what the fork server had loaded before this process existed."""
    torch = sys.modules["torch"]
    report = {"cuda_initialized": torch.cuda.is_initialized(), "bad_fork": torch.cuda._is_in_bad_fork()}
    return JobOutcome(report={**report, "threads": torch.get_num_threads(), "sum": float(torch.ones(1000).sum())})


def gated_merge(context: JobContext) -> JobOutcome:
    """The real merge, which in its first attempt stops in the middle until somebody opens the gate."""
    from workers.jobs import merge

    return merge.run(HeldContext(context) if context.spec.attempt == 1 else context)


class HeldContext(JobContext):
    """Waits for the gate when the merge tells that the first module is done."""

    def __init__(self, context: JobContext) -> None:
        super().__init__(context.spec, context.database, context.blobs, context._interruption)

    def progress(self, fraction: float, message: str, step: int | None = None, total: int | None = None) -> None:
        if message.startswith("Merged"):
            self._last_progress = float("-inf")  # that it waits must be told, however soon after the last message
            wait_for_gate(self)
        super().progress(fraction, message, step, total)


def mortal_merge(context: JobContext) -> JobOutcome:
    """The real merge, killed in its first attempt at the moment `dies`."""
    from workers import publishing, runtime
    from workers.jobs import merge

    def die(*_args: object, **_options: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if context.spec.attempt == 1:
        match context.params["dies"]:
            case "fetching":
                context.blobs.materialize = die
            case "merging":
                merge.engine.check_reload = die
            case "storing blobs":
                context.blobs.put_file = die
            case "before the transaction":
                publishing.claims.fence = die
            case "inside the transaction":
                publishing.claims.finish_succeeded = die
            case "after the transaction":
                runtime.peak_memory = die
    return merge.run(context)


def is_alive(context: JobContext) -> JobOutcome:
    """Reports whether the process `pid` still exists, reaped or not."""
    return JobOutcome(report={"exists": Path(f"/proc/{context.params['pid']}").exists()})
