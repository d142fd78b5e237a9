"""What a failure means for the job: which error its owner reads, and whether trying again can help."""

from __future__ import annotations

import signal
import sys
from dataclasses import asdict
from typing import Any

from artifacts.errors import (
    BlobStoreUnavailable,
    DatabaseUnavailable,
    DiskFull,
    RankwiseError,
    RemoteUnavailable,
)
from storage.faults import is_disk_full
from workers.attempt import Outcome, Retry

# Failures of the surroundings: the same attempt may succeed later or elsewhere.
_INFRASTRUCTURE = (DiskFull, BlobStoreUnavailable, DatabaseUnavailable, RemoteUnavailable)
_CUDA_OOM_TEXTS = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
PEER_LOST = "rank_lost"
_PEER_LOST_TEXTS = ("Connection closed by peer", "Connection reset by peer", "NCCL", "[c10d]", "gloo")
_LOST_HINT = "Ray's dashboard and `ray list nodes` tell what became of the node; what the job had written is gone."
_LOG_HINT = "The attempt's log has the traceback; its last lines are in error.log."


def failed(error: BaseException) -> Outcome:
    """The outcome of an attempt that raised `error`."""
    described, retry = _describe(error)
    return Outcome("failed", described, retry)


def _describe(error: BaseException) -> tuple[dict[str, Any], Retry]:
    if isinstance(error, RankwiseError):
        retry: Retry = "infrastructure" if isinstance(error, _INFRASTRUCTURE) else "never"
        described = _error(error.code, error.detail, error.hint)
        if error.errors:
            described["errors"] = [asdict(item) for item in error.errors]
        return described, retry
    if is_cuda_out_of_memory(error):
        return _error("cuda_out_of_memory", _first_line(error), "Use a smaller job or a device with more memory."), (
            "out_of_memory"
        )
    if is_peer_lost(error):
        return _error(PEER_LOST, "Another rank of the attempt was lost.", _LOG_HINT), "infrastructure"
    if isinstance(error, OSError) and is_disk_full(error):
        where = f" while writing {error.filename}" if error.filename else ""
        return _error(DiskFull.code, f"The disk of the worker is full{where}.", "Free some space."), "infrastructure"
    if isinstance(error, MemoryError):
        return _error("out_of_memory", "The worker could not get the memory it asked for.", _LOG_HINT), "infrastructure"
    detail = f"An unexpected {type(error).__name__} ended the attempt: {_first_line(error)}"
    return _error("internal_error", detail, _LOG_HINT), "never"


def is_cuda_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory ran out; torch has several ways to say so."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CUDA_OOM_TEXTS)


def is_peer_lost(error: BaseException) -> bool:
    """Whether a collective operation failed because another rank is not there any more."""
    if "torch.distributed" not in sys.modules or not isinstance(error, RuntimeError):
        return False
    distributed = sys.modules["torch.distributed"]
    return isinstance(error, distributed.DistError) or any(text in str(error) for text in _PEER_LOST_TEXTS)


def crashed(ended: dict[str, Any]) -> dict[str, Any]:
    """The error of an attempt whose process ended without a word, or on a host that was lost."""
    if "lost" in ended:
        return _error("worker_lost", f"The worker was lost in the middle of the job: {ended['lost']}.", _LOST_HINT)
    number = ended["signal"]
    if number is None:
        return _error(
            "worker_crashed",
            f"The worker process exited with code {ended['code']} in the middle of the job.",
            _LOG_HINT,
        )
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    detail = f"The worker process was ended by {name} ({number})."
    hint = _LOG_HINT
    if number == signal.SIGKILL:
        hint = "Something on the worker's host killed it; if its memory ran out, the kernel's log says so."
    return _error("worker_crashed", detail, hint)


def interrupted() -> dict[str, Any]:
    """The error of an attempt that somebody other than this pool asked to stop."""
    return _error(
        "worker_interrupted", "The worker process was asked to stop (SIGTERM) from outside of the pool.", None
    )


def not_started(why: str) -> dict[str, Any]:
    """The error of an attempt for which no process could be started."""
    return _error("worker_not_started", f"A process for the attempt could not be started: {why}.", None)


def lease_not_renewed() -> dict[str, Any]:
    """The error of an attempt that was ended because its lease could not be prolonged in time."""
    return _error(
        "lease_expired",
        "The server could not reach the database for as long as the lease of the job lasted, and ended the attempt.",
        "Look at the server's log for the database's failure.",
    )


def timed_out(seconds: float) -> dict[str, Any]:
    """The error of an attempt that ran longer than its job allows."""
    return _error(
        "job_timeout",
        f"The attempt ran longer than the {seconds:g} s that resources.timeout_seconds allows.",
        "Allow more time, or make the job smaller.",
    )


def end_not_written(error: BaseException) -> dict[str, Any]:
    """The error of an attempt whose end could not be written as it was."""
    detail = f"How the attempt ended could not be written: an unexpected {type(error).__name__}."
    return _error("internal_error", detail, "The server's log has the traceback.")


def unknown_kind(kind: str) -> dict[str, Any]:
    """The error of a job that this server has no function for."""
    return _error("unknown_kind", f"This server can not run jobs of kind {kind!r}.", "Are all servers of one version?")


def _error(code: str, detail: str, hint: str | None) -> dict[str, Any]:
    return {"code": code, "detail": detail, "hint": hint}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:500] if lines else "no message"
