"""What is sent to a worker process and what comes back: plain, picklable values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from workers.remotes import Remotes

State = Literal["succeeded", "failed", "cancelled", "stale", "paused"]
Retry = Literal["never", "infrastructure", "out_of_memory"]


@dataclass(frozen=True, slots=True)
class AttemptSpec:
    """One attempt at a job, with everything that the worker process needs to run it.

    Attributes:
        attempt: the fencing token.
        function: what runs the kind of job, as "module:function".
        device: what torch calls the (first) device inside the worker process ("cpu", "cuda:0").
        devices: number of devices; with more than one the process forks a rank for each (`workers.ranks`).
        scratch: a folder of this attempt alone, removed when it ends.
        cache: a folder for downloaded blobs, shared by all workers of the machine.
        log: the file that gets the attempt's standard output and error; "" leaves them alone.
        model_roots: folders under which local base models may lie.
        warm_bytes: base models that the worker may keep in memory, bytes; None: a share of what the device has.
        resources: the job's own wishes and the hints of earlier attempts (`reduce_memory`).
        safety_checker: folder of the checker that images are shown to; None: they are not checked.
        remotes: where adapters may be fetched from and sent to.
    """

    job_id: str
    attempt: int
    kind: str
    params: Mapping[str, Any]
    slot: str
    device: str
    database_url: str
    blob_url: str
    scratch: str
    cache: str
    model_roots: tuple[str, ...]
    function: str
    log: str = ""
    devices: int = 1
    warm_bytes: int | None = None
    resources: Mapping[str, Any] = field(default_factory=dict)
    safety_checker: str | None = None
    remotes: Remotes = field(default_factory=Remotes)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended, as its worker process tells it.

    Attributes:
        state: "succeeded" is published already; "paused" is written too: the job waits for jobs of its own; "stale"
            means that a newer attempt owns the job.
        error: {code, detail, hint, errors} of a failure.
        retry: whether trying again can help, by the cause of the failure.
        peak_memory: largest resident set of the process during the attempt, bytes.
        warm: ids of the base models that the process now holds.
        spent: the process serves no other attempt.
    """

    state: State
    error: dict[str, Any] | None = None
    retry: Retry = "never"
    peak_memory: int | None = None
    warm: tuple[str, ...] = ()
    spent: bool = False
