"""`rankwise jobs`: list, look at, follow, read the logs, cancel, retry."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from app.cli.client import Client
from app.cli.job_reports import REPORTS
from app.cli.options import Cursor, JobId, Json, Limit
from app.cli.output import duration, fields, moment, note, note_more, print_json, size, stdout, table
from app.cli.progress import require_success, watch

app = typer.Typer(help="Jobs: list, look at, follow, read the logs, cancel, retry.", no_args_is_help=True)


def summary(job: dict[str, Any]) -> dict[str, Any]:
    """The fields of a job that a person looks for first, in order."""
    progress, error, result = job.get("progress") or {}, job.get("error") or {}, job.get("result") or {}
    waiting, eta = job.get("waiting") or {}, job.get("eta_seconds")
    return {
        "id": job["id"],
        "kind": job["kind"],
        "state": job["state"],
        "position": job.get("position"),
        "waits for": f"[{waiting['reason']}] {waiting['detail']}" if waiting else None,
        "done in about": duration(eta) if eta is not None else None,
        "attempt": job.get("attempt"),
        "progress": f"{progress.get('fraction') or 0:.0%} {progress.get('message') or ''}".strip(),
        "params": job.get("params"),
        "adapters": result.get("adapters"),
        "images": result.get("images"),
        "error": f"[{error['code']}] {error.get('detail')}" if error.get("code") else None,
        "hint": error.get("hint"),
        "exit": error.get("exit"),
        "created": moment(job.get("created_at")),
        "started": moment(job.get("started_at")),
        "finished": moment(job.get("finished_at")),
    }


def show(job: dict[str, Any]) -> None:
    """Print a job, and its report when it has one."""
    stdout().print(fields(job["id"], summary(job)))
    report = (job.get("result") or {}).get("report")
    if report:
        if job["kind"] in REPORTS:
            REPORTS[job["kind"]](stdout(), report)
        else:  # of a newer service
            print_json(report)


def conclude(
    client: Client,
    job: dict[str, Any],
    *,
    wait: bool,
    as_json: bool,
    show_ended: Callable[[dict[str, Any]], None] = show,
) -> dict[str, Any] | None:
    """Follow a job that was just submitted to its end and print it; with `wait` off, say how to follow it.

    Args:
        show_ended: prints the job when it has succeeded, unless `as_json`.

    Returns:
        the job that has succeeded; None when nobody waits for it.

    Raises:
        ProblemError: it failed or was cancelled.
    """
    if wait:
        job = require_success(watch(client, job["id"]))
    if as_json:
        print_json(job)
    elif wait:
        show_ended(job)
    else:
        show(job)
    if wait:
        return job
    note(f"follow it: rankwise jobs watch {job['id']}")
    return None


@app.command("list")
def list_jobs(
    context: typer.Context,
    kind: Annotated[str | None, typer.Option("--kind", help="Only this kind, e.g. merge.")] = None,
    state: Annotated[str | None, typer.Option("--state", help="Only this state, e.g. running.")] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
    as_json: Json = False,
) -> None:
    """List jobs, newest first."""
    with context.obj() as client:
        page = client.get("/jobs", kind=kind, state=state, limit=limit, cursor=cursor)
    if as_json:
        print_json(page)
        return
    rows = [
        (
            job["id"],
            job["kind"],
            job["state"],
            f"{(job.get('progress') or {}).get('fraction') or 0:.0%}",
            job.get("attempt"),
            (job.get("error") or {}).get("code") or (job.get("progress") or {}).get("message"),
            moment(job.get("created_at")),
        )
        for job in page["items"]
    ]
    stdout().print(table(None, ("id", "kind", "state", "#done", "#attempt", "message", "created"), rows))
    note_more(page)


@app.command("get")
def get(context: typer.Context, job: JobId, as_json: Json = False) -> None:
    """Show one job with its report or its error."""
    with context.obj() as client:
        found = client.get(f"/jobs/{job}")
    print_json(found) if as_json else show(found)


@app.command("watch")
def watch_job(context: typer.Context, job: JobId, as_json: Json = False) -> None:
    """Follow a job to its end; exit code 1 unless it succeeds."""
    with context.obj() as client:
        found = watch(client, job)
    require_success(found)
    print_json(found) if as_json else show(found)


@app.command("attempts")
def attempts(context: typer.Context, job: JobId, as_json: Json = False) -> None:
    """List the attempts of a job: where each ran and how it ended."""
    with context.obj() as client:
        found = client.get(f"/jobs/{job}/attempts")
    if as_json:
        print_json(found)
        return
    rows = [
        (
            item["attempt"],
            item["outcome"] or "running",
            item["server"],
            item["slot"],
            moment(item["started_at"]),
            moment(item["finished_at"]),
            _exit(item["exit"] or {}),
            size((item["exit"] or {}).get("peak_memory")),
            item["has_log"],
        )
        for item in found["items"]
    ]
    columns = ("#attempt", "outcome", "server", "slot", "started", "finished", "exit", "#peak memory", "log")
    stdout().print(table(None, columns, rows))


def _exit(ended: dict[str, Any]) -> str | None:
    """How a worker process ended, in a word or two."""
    if ended.get("signal") is not None:
        return f"signal {ended['signal']}"
    return f"code {ended['code']}" if ended.get("code") is not None else None


@app.command("logs")
def logs(
    context: typer.Context,
    job: JobId,
    attempt: Annotated[int | None, typer.Option("--attempt", min=1, help="Which attempt; else the newest.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Print what comes until the job (with --attempt, the attempt) has ended.")
    ] = False,
) -> None:
    """Print what a job has written."""
    with context.obj() as client:
        if follow and attempt is None:
            _follow(client, job)
        else:
            _print_log(client, job, attempt, follow=follow)


def _print_log(client: Client, job: str, attempt: int | None, *, follow: bool) -> None:
    for text in client.text(f"/jobs/{job}/logs", attempt=attempt, follow=follow):
        sys.stdout.write(text)
        sys.stdout.flush()


def _follow(client: Client, job: str) -> None:
    """The log of the newest attempt, and of those that come."""
    first = int(client.get(f"/jobs/{job}")["attempt"])
    for kind, data in client.events(job):
        if kind == "state" and data.get("state") == "running" and int(data["attempt"]) >= first:
            note(f"attempt {data['attempt']}")
            _print_log(client, job, int(data["attempt"]), follow=True)


@app.command("cancel")
def cancel(context: typer.Context, job: JobId, as_json: Json = False) -> None:
    """Cancel a job: at once when it is queued, else as soon as its worker has stopped."""
    with context.obj() as client:
        found = client.post(f"/jobs/{job}/cancel")
    print_json(found) if as_json else show(found)


@app.command("retry")
def retry(context: typer.Context, job: JobId, as_json: Json = False) -> None:
    """Run a failed or cancelled job again, as a new job."""
    with context.obj() as client:
        found = client.post(f"/jobs/{job}/retry")
    print_json(found) if as_json else show(found)
