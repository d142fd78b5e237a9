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
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

import structlog

from artifacts.errors import AttemptCancelled, AttemptStale
from artifacts.menu import accepted_parameters
from storage.blobs import BlobStore
from storage.database import Database
from workers import failures
from workers.attempt import AttemptSpec, Outcome
from workers.cache import prune
from workers.context import Interruption, JobContext, JobOutcome
from workers.forkserver import RSS_UNIT
from workers.kinds import SINGLE_USE
from workers.log_shipping import LogShipper
from workers.logs import captured_output
from workers.pauses import JobPause, pause
from workers.publishing import publish
from workers.ranks import RankFailedError, Ranks, is_follow_up, process_group, rank_spec
from workers.warm_models import WarmModels

READY = "ready"
CACHE_BYTES = 20 * 1024**3
RANK_END_SECONDS = 5.0

log = structlog.get_logger(__name__)


def serve(channel_fd: int) -> None:
    """Run attempts from the channel until it closes, or until an attempt was interrupted or trained a model.

    Such a process is not used again: only its end gives back all that the attempt held.
    """
    channel = Connection(channel_fd)
    interruption = Interruption()
    _handle_signals(interruption)
    channel.send(READY)
    while True:
        try:
            spec: AttemptSpec = channel.recv()
        except (EOFError, ConnectionResetError):  # the server has gone
            return
        interruption.attempt_runs = True
        outcome = run_attempt(spec, interruption)
        channel.send(outcome)
        if outcome.state in ("cancelled", "stale") or outcome.spent or interruption.wanted:
            return
        interruption.attempt_runs = False


def _handle_signals(interruption: Interruption) -> None:
    def stop(_number: int, _frame: FrameType | None) -> None:
        if not interruption.attempt_runs:
            raise SystemExit(0)
        interruption.wanted = True
        if interruption.forward is not None:
            interruption.forward()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run_attempt(spec: AttemptSpec, interruption: Interruption) -> Outcome:
    """Run the job and publish its result. Never raises: whatever happened is in the outcome."""
    forget_peak_memory()
    scratch = Path(spec.scratch)
    try:
        with captured_output(Path(spec.log)) if spec.log else nullcontext():
            scratch.mkdir(parents=True, exist_ok=True)
            # The ranks are forked while this process has no other thread, whose locks they would inherit.
            with _other_ranks(spec, interruption) as ranks, _shipped_log(spec):
                outcome = _run(spec, interruption, ranks)
                if ranks is not None and is_follow_up(outcome):
                    outcome = ranks.cause(wait=RANK_END_SECONDS) or outcome
            ranks_memory = 0 if ranks is None else ranks.peak_memory
    except OSError as error:  # the log or the scratch folder could not be made
        outcome, ranks_memory = failures.failed(error), 0
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    prune(Path(spec.cache), CACHE_BYTES)
    spent = spec.kind in SINGLE_USE
    return replace(outcome, peak_memory=ranks_memory + peak_memory(), warm=warm_models().ids, spent=spent)


@contextmanager
def _shipped_log(spec: AttemptSpec) -> Iterator[None]:
    """What the attempt's log file gets goes on to who reads it now."""
    if not spec.log:
        yield
        return
    shipper = LogShipper(
        Path(spec.log), spec.job_id, spec.attempt, lambda: _stores(spec.database_url, spec.blob_url)[0]
    )
    with shipper:
        yield
    if shipper.failure is not None:
        log.warning("log_not_shipped", job_id=spec.job_id, attempt=spec.attempt, error=shipper.failure)


@contextmanager
def _other_ranks(spec: AttemptSpec, interruption: Interruption) -> Iterator[Ranks | None]:
    """The ranks beside this process, which is number 0; None for an attempt on one device."""
    if spec.devices == 1:
        yield None
        return

    def run_other(rank: int) -> Outcome:
        Path(rank_spec(spec, rank).scratch).mkdir()
        return _run(spec, interruption, None, rank)

    ranks = Ranks(spec, run_other)
    interruption.forward = ranks.interrupt
    try:
        yield ranks
    finally:
        interruption.forward = None
        ranks.close()


def _run(spec: AttemptSpec, interruption: Interruption, ranks: Ranks | None, rank: int = 0) -> Outcome:
    """Run the job's function; rank 0 publishes what it returns when all the others have ended well."""
    try:
        function = load_function(spec.function)
        database, blobs = _stores(spec.database_url, spec.blob_url)
        context = JobContext(rank_spec(spec, rank), database, blobs, interruption, warm_models(), rank)
        context.check_cancelled()
        with accepted_parameters(), process_group(spec, rank) if spec.devices > 1 else nullcontext():
            result = function(context)
        if rank == 0:
            if ranks is not None:
                ranks.join()
            if isinstance(result, JobPause):
                pause(context, result)
                return Outcome("paused")
            publish(context, result)
    except RankFailedError as error:
        return error.outcome
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


@functools.lru_cache(maxsize=1)
def warm_models() -> WarmModels:
    """The base models that this process keeps in memory from one attempt to the next."""
    return WarmModels()


def load_function(name: str) -> Callable[[JobContext], JobOutcome | JobPause]:
    """Import "module:function"."""
    module, _, function = name.partition(":")
    loaded: Callable[[JobContext], JobOutcome | JobPause] = getattr(importlib.import_module(module), function)
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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
