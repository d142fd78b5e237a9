"""Progress bars on standard error: bytes of a transfer, and a job followed through its events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from app.cli.client import TERMINAL_STATES, Client, ProblemError
from app.cli.output import json_wanted, stderr


def _progress(*columns: ProgressColumn) -> Progress:
    """A display that leaves nothing behind; silent in a pipe, where bars would only be lines."""
    console = stderr()
    return Progress(*columns, console=console, disable=json_wanted() or not console.is_terminal, transient=True)


@contextmanager
def transfer(label: str, total: int | None) -> Iterator[Callable[[int, int | None], None]]:
    """A bar of bytes; the function it gives takes the bytes that came and the size of the whole, once known."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with _progress(*columns) as progress:
        task = progress.add_task(label, total=total)

        def advance(count: int, whole: int | None) -> None:
            if whole is not None:
                progress.update(task, total=whole)
            progress.advance(task, count)

        yield advance


@contextmanager
def steps(label: str) -> Iterator[Callable[[float, str], None]]:
    """A bar from 0 to 1; the function it gives takes the fraction done and what is being done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with _progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task(label, total=1.0)

        def advance(fraction: float, message: str) -> None:
            progress.update(task, completed=fraction, description=f"{label}: {message}" if message else label)

        yield advance


def watch(client: Client, job_id: str) -> dict[str, Any]:
    """Follow a job to its end and return it. Does not judge how it ended.

    Raises:
        ProblemError: the job does not exist, or the service is gone.
    """
    job: dict[str, Any] = client.get(f"/jobs/{job_id}")
    if job["state"] in TERMINAL_STATES:
        return job
    with steps(f"{job['kind']} {job_id}") as advance:
        fraction, message = float(job["progress"]["fraction"]), str(job["state"])
        for kind, data in client.events(job_id):
            fraction = float(data.get("fraction") or fraction)
            message = str(data.get("state" if kind == "state" else "message") or message)
            advance(fraction, message)
    ended: dict[str, Any] = client.get(f"/jobs/{job_id}")
    return ended


def require_success(job: dict[str, Any]) -> dict[str, Any]:
    """The job if it succeeded.

    Raises:
        ProblemError: it failed or was cancelled, with the job's own code, detail and hint.
    """
    if job["state"] == "succeeded":
        return job
    error = job.get("error") or {}
    raise ProblemError(
        {
            "code": error.get("code") or f"job_{job['state']}",
            "detail": error.get("detail") or f"the job {job['id']} is {job['state']}",
            "hint": error.get("hint"),
            "errors": error.get("errors") or [],
            "job": job,
        }
    )
