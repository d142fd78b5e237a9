"""The inside of a worker process: take an attempt, run it, tell how it ended, take the next one.

Imported by the fork server before it forks, so nothing here may start a thread, open a connection or touch CUDA.
"""

from __future__ import annotations

import functools
import importlib
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

import structlog

from artifacts.errors import AttemptCancelled, AttemptStale
from storage.blobs import BlobStore
from storage.database import Database
from workers import failures
from workers.attempt import AttemptSpec, Outcome
from workers.cache import prune
from workers.context import Interruption, JobContext, JobOutcome, publish
from workers.logs import captured_output

READY = "ready"
CACHE_BYTES = 20 * 1024**3
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024

log = structlog.get_logger(__name__)


def serve(channel_fd: int) -> None:
    """Run attempts from the channel until it closes, or until an attempt was interrupted.

    An interrupted process is not used again: only its end gives back all that the attempt held.
    """
    channel = Connection(channel_fd)
    interruption = Interruption()
    _handle_signals(interruption)
    channel.send(READY)
    while True:
        try:
            spec: AttemptSpec = channel.recv()
        except EOFError:
            return
        interruption.attempt_runs = True
        outcome = run_attempt(spec, interruption)
        channel.send(outcome)
        if outcome.state in ("cancelled", "stale") or interruption.wanted:
            return
        interruption.attempt_runs = False


def _handle_signals(interruption: Interruption) -> None:
    def stop(_number: int, _frame: FrameType | None) -> None:
        if not interruption.attempt_runs:
            raise SystemExit(0)
        interruption.wanted = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run_attempt(spec: AttemptSpec, interruption: Interruption) -> Outcome:
    """Run the job and publish its result. Never raises: whatever happened is in the outcome."""
    forget_peak_memory()
    scratch = Path(spec.scratch)
    try:
        with captured_output(Path(spec.log)) if spec.log else nullcontext():
            scratch.mkdir(parents=True, exist_ok=True)
            outcome = _run(spec, interruption)
    except OSError as error:  # the log or the scratch folder could not be made
        outcome = failures.failed(error)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    prune(Path(spec.cache), CACHE_BYTES)
    return replace(outcome, peak_memory=peak_memory())


def _run(spec: AttemptSpec, interruption: Interruption) -> Outcome:
    try:
        function = load_function(spec.function)
        database, blobs = _stores(spec.database_url, spec.blob_url)
        context = JobContext(spec, database, blobs, interruption)
        context.check_cancelled()
        publish(context, function(context))
    except AttemptCancelled as error:
        log.info("attempt_cancelled", job_id=spec.job_id, attempt=spec.attempt, detail=error.detail)
        return Outcome("cancelled")
    except AttemptStale as error:
        log.warning("attempt_stale", job_id=spec.job_id, attempt=spec.attempt, detail=error.detail)
        return Outcome("stale")
    except (Exception, SystemExit) as error:
        # Into the attempt's log; the job's error names only the exception.
        traceback.print_exc()
        return failures.failed(error)
    return Outcome("succeeded")


def load_function(name: str) -> Callable[[JobContext], JobOutcome]:
    """Import "module:function"."""
    module, _, function = name.partition(":")
    loaded: Callable[[JobContext], JobOutcome] = getattr(importlib.import_module(module), function)
    return loaded


@functools.lru_cache(maxsize=1)
def _stores(database_url: str, blob_url: str) -> tuple[Database, BlobStore]:
    return Database(database_url), BlobStore(blob_url)


def forget_peak_memory() -> None:
    """Start counting the peak anew, where the kernel allows it; elsewhere the peak is the process's."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        log.debug("peak_memory_not_reset", pid=os.getpid(), error=str(error))


def peak_memory() -> int:
    """Largest resident set since `forget_peak_memory`, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
