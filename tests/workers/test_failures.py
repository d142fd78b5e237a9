"""Which error a user reads for which exception, and whether it is tried again."""

from __future__ import annotations

import errno
import signal

import pytest

from artifacts.errors import (
    BlobCorrupt,
    BlobMissing,
    BlobStoreUnavailable,
    DatabaseUnavailable,
    DiskFull,
    MergeRefused,
    NotFound,
    ReloadMismatch,
)
from workers import failures


@pytest.mark.parametrize("kind", [MergeRefused, NotFound, BlobMissing, BlobCorrupt, ReloadMismatch])
def test_what_a_retry_can_not_mend_is_never_retried(kind: type[Exception]) -> None:
    outcome = failures.failed(kind("no"))
    assert (outcome.state, outcome.retry) == ("failed", "never")
    assert outcome.error == {"code": kind.code, "detail": "no", "hint": None}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DiskFull("x"), "disk_full"),
        (BlobStoreUnavailable("x"), "blob_store_unavailable"),
        (DatabaseUnavailable("x"), "database_unavailable"),
        (OSError(errno.ENOSPC, "No space", "/f"), "disk_full"),
        (OSError(errno.EDQUOT, "Quota"), "disk_full"),
        (MemoryError(), "out_of_memory"),
    ],
)
def test_failures_of_the_surroundings(error: Exception, code: str) -> None:
    outcome = failures.failed(error)
    assert outcome.error is not None
    assert (outcome.error["code"], outcome.retry) == (code, "infrastructure")


@pytest.mark.parametrize(
    "text",
    ["CUDA out of memory. Tried to allocate 2.00 GiB", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"],
)
def test_the_devices_memory(text: str) -> None:
    assert failures.failed(RuntimeError(text)).retry == "out_of_memory"


def test_torchs_own_class_is_known() -> None:
    import torch

    assert failures.failed(torch.OutOfMemoryError("any words")).retry == "out_of_memory"


@pytest.mark.parametrize("error", [RuntimeError("shape"), KeyError("k"), OSError(errno.ENOENT, "gone"), SystemExit(3)])
def test_everything_else_is_a_bug(error: BaseException) -> None:
    outcome = failures.failed(error)
    assert outcome.error is not None
    assert (outcome.error["code"], outcome.retry) == ("internal_error", "never")
    assert type(error).__name__ in outcome.error["detail"]


def test_only_the_first_line_of_a_bug_is_its_detail() -> None:
    outcome = failures.failed(ValueError("first\nsecond"))
    assert outcome.error is not None
    assert outcome.error["detail"].endswith("first")
    assert failures.failed(ValueError()).error["detail"].endswith("no message")  # type: ignore[index]


def test_a_crash_names_its_signal_or_code() -> None:
    assert "SIGBUS" in failures.crashed({"code": None, "signal": int(signal.SIGBUS), "peak_memory": 1})["detail"]
    assert "signal 99" in failures.crashed({"code": None, "signal": 99, "peak_memory": 1})["detail"]
    assert "code 3" in failures.crashed({"code": 3, "signal": None, "peak_memory": 1})["detail"]
    assert "memory" in failures.crashed({"code": None, "signal": 9, "peak_memory": 1})["hint"]
