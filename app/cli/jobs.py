"""`rankwise jobs`: list, look at, follow, cancel, retry."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from app.cli.options import Cursor, JobId, Json, Limit
from app.cli.output import fields, moment, note, print_json, stdout, table
from app.cli.progress import require_success, watch
from app.cli.reports import print_report

app = typer.Typer(help="Jobs: list, look at, follow, cancel, retry.", no_args_is_help=True)


def summary(job: dict[str, Any]) -> dict[str, Any]:
    """The fields of a job that a person looks for first, in order."""
    progress, error, result = job.get("progress") or {}, job.get("error") or {}, job.get("result") or {}
    return {
        "id": job["id"],
        "kind": job["kind"],
        "state": job["state"],
        "position": job.get("position"),
        "attempt": job.get("attempt"),
        "progress": f"{progress.get('fraction') or 0:.0%} {progress.get('message') or ''}".strip(),
        "params": job.get("params"),
        "adapters": result.get("adapters"),
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
        print_report(stdout(), report)


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
    if page.get("next"):
        note(f"more: --cursor {page['next']}")


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
