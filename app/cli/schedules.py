"""`rankwise schedules`: jobs that are made again and again, at times or at events."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.fleets import add_to, parse_window
from app.cli.jobs import conclude
from app.cli.options import Cursor, Json, Limit
from app.cli.output import fields, moment, note, note_more, print_json, stdout, table

app = typer.Typer(help="Schedules: jobs at fixed times or at events.", no_args_is_help=True)


class Overlap(Enum):
    """What a firing does while a job of an earlier one is unfinished."""

    SKIP = "skip"
    QUEUE = "queue"
    REPLACE = "replace"


class Misfire(Enum):
    """What comes of firings that no server was there for."""

    RUN_ONCE = "run-once"
    SKIP = "skip"


class Event(Enum):
    """What a schedule can wait for."""

    REGISTERED = "base_model.registered"
    DEPRECATED = "base_model.deprecated"
    REMOVED = "base_model.removed"


ScheduleId = Annotated[str, typer.Argument(metavar="SCHEDULE", help="A schedule's id (sch_…).")]
NameOption = Annotated[str | None, typer.Option("--name", help="Name; made of the job and the trigger unless given.")]
CronOption = Annotated[
    str | None, typer.Option("--cron", help="Minute, hour, day of month, month, day of week: '30 3 * * MON-FRI'.")
]
TimezoneOption = Annotated[str | None, typer.Option("--timezone", help="Of --cron, e.g. Europe/Berlin; else UTC.")]
EventOption = Annotated[Event | None, typer.Option("--event", help="Fire at this event instead of at times.")]
SubjectOption = Annotated[
    str | None, typer.Option("--subject", metavar="MODEL", help="Of --event: only of this base model.")
]
ParamsOption = Annotated[
    str | None, typer.Option("--params", metavar="JSON", help="Parameters of the job, or @FILE that holds them.")
]
ResourcesOption = Annotated[
    str | None, typer.Option("--resources", metavar="JSON", help='E.g. {"timeout_seconds": 600}, or @FILE.')
]
OverlapOption = Annotated[Overlap | None, typer.Option("--overlap", help="While an earlier job is unfinished.")]
MisfireOption = Annotated[Misfire | None, typer.Option("--misfire", help="After times that no server was there for.")]
SelectorOption = Annotated[
    str | None,
    typer.Option("--selector", metavar="JSON", help='Of a fleet of transfers: {"base_model": …}, or @FILE.'),
]
ParallelOption = Annotated[
    int | None, typer.Option("--max-parallel", min=1, help="Of a fleet: how many jobs may be unfinished at once.")
]
WindowOption = Annotated[
    str | None,
    typer.Option(
        "--window", metavar="FROM-TO", help="Of a fleet: when jobs may start, 22:00-06:00[@Europe/Berlin] or always."
    ),
]
VersionOption = Annotated[
    int | None, typer.Option("--if-version", min=1, help="Only if the schedule still has this version.")
]


def summary(schedule: dict[str, Any]) -> dict[str, Any]:
    """The fields of a schedule that a person looks for first, in order."""
    trigger, job = schedule["trigger"], schedule["job"]
    return {
        "id": schedule["id"],
        "name": schedule["name"],
        "cron": trigger.get("cron"),
        "time zone": trigger.get("timezone"),
        "event": trigger.get("event"),
        "subject": trigger.get("subject"),
        "kind": job["kind"],
        "params": job["params"],
        "resources": job["resources"],
        "selector": job.get("selector"),
        "at once": schedule.get("max_parallel"),
        "window": schedule.get("window"),
        "overlap": schedule["overlap"],
        "misfire": schedule["misfire"],
        "enabled": schedule["enabled"],
        "next": schedule["next_fire_at"] and moment(schedule["next_fire_at"]),
        "version": schedule["version"],
        "created by": schedule.get("created_by"),
        "created": moment(schedule["created_at"]),
        "updated": moment(schedule["updated_at"]),
    }


def _show(schedule: dict[str, Any], as_json: bool) -> None:
    print_json(schedule) if as_json else stdout().print(fields(schedule["name"], summary(schedule)))


@app.command("list")
def list_schedules(context: typer.Context, limit: Limit = 50, cursor: Cursor = None, as_json: Json = False) -> None:
    """List schedules, newest first."""
    with context.obj() as client:
        page = client.get("/schedules", limit=limit, cursor=cursor)
    if as_json:
        print_json(page)
        return
    rows = [
        (
            item["id"],
            item["name"],
            item["trigger"].get("cron") or item["trigger"].get("event"),
            item["trigger"].get("timezone") or item["trigger"].get("subject"),
            item["job"]["kind"],
            moment(item["next_fire_at"]) if item["enabled"] else "disabled",
        )
        for item in page["items"]
    ]
    stdout().print(table(None, ("id", "name", "trigger", "of", "kind", "next"), rows))
    note_more(page)


@app.command("get")
def get(context: typer.Context, schedule: ScheduleId, as_json: Json = False) -> None:
    """Show one schedule."""
    with context.obj() as client:
        _show(client.get(f"/schedules/{schedule}"), as_json)


@app.command("create")
def create(
    context: typer.Context,
    params: Annotated[
        str, typer.Option("--params", metavar="JSON", help="Parameters of the job, or @FILE that holds them.")
    ],
    kind: Annotated[str, typer.Option("--kind", help="Kind of the job.")] = "merge",
    name: NameOption = None,
    cron: CronOption = None,
    timezone: TimezoneOption = None,
    event: EventOption = None,
    subject: SubjectOption = None,
    resources: ResourcesOption = None,
    selector: SelectorOption = None,
    max_parallel: ParallelOption = None,
    window: WindowOption = None,
    overlap: OverlapOption = None,
    misfire: MisfireOption = None,
    enabled: Annotated[bool, typer.Option("--enabled/--disabled", help="Whether it fires from now on.")] = True,
    as_json: Json = False,
) -> None:
    """Make a schedule. Its job is checked now, as if it were submitted now."""
    trigger = _trigger(cron, timezone, event, subject)
    if trigger is None:
        raise typer.BadParameter("give --cron or --event")
    job = {"kind": kind, "params": parse_document(params, "--params")}
    if resources is not None:
        job["resources"] = parse_document(resources, "--resources")
    if selector is not None:
        job["selector"] = parse_document(selector, "--selector")
    document = {
        "name": name,
        "trigger": trigger,
        "job": job,
        "enabled": enabled,
        "max_parallel": max_parallel,
        "window": None if window is None else parse_window(window),
        **_policies(overlap, misfire),
    }
    with context.obj() as client:
        _show(client.post("/schedules", {key: value for key, value in document.items() if value is not None}), as_json)


@app.command("update")
def update(
    context: typer.Context,
    schedule: ScheduleId,
    name: NameOption = None,
    cron: CronOption = None,
    timezone: TimezoneOption = None,
    event: EventOption = None,
    subject: SubjectOption = None,
    params: ParamsOption = None,
    resources: ResourcesOption = None,
    selector: SelectorOption = None,
    max_parallel: ParallelOption = None,
    window: WindowOption = None,
    overlap: OverlapOption = None,
    misfire: MisfireOption = None,
    enabled: Annotated[
        bool | None, typer.Option("--enable/--disable", help="Go on from now, or pause; as it is unless given.")
    ] = None,
    if_version: VersionOption = None,
    as_json: Json = False,
) -> None:
    """Change a schedule: what is not given stays."""
    document = {
        "name": name,
        "trigger": _trigger(cron, timezone, event, subject),
        "enabled": enabled,
        "max_parallel": max_parallel,
        **_policies(overlap, misfire),
    }
    changes: dict[str, Any] = {key: value for key, value in document.items() if value is not None}
    if window is not None:
        changes["window"] = parse_window(window)
    job = {
        field: parse_document(text, f"--{field}")
        for field, text in (("params", params), ("resources", resources), ("selector", selector))
        if text is not None
    }
    with context.obj() as client:
        if job:
            # The API replaces a job as a whole: take the rest of it from the version that is changed.
            present = client.get(f"/schedules/{schedule}")
            changes["job"] = {**present["job"], **job}
            if_version = if_version or present["version"]
        _show(client.patch(f"/schedules/{schedule}", changes, **_if_match(if_version)), as_json)


@app.command("delete")
def delete(
    context: typer.Context,
    schedule: ScheduleId,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    if_version: VersionOption = None,
    as_json: Json = False,
) -> None:
    """Delete a schedule; the jobs that it made stay."""
    if not yes:
        typer.confirm(f"delete {schedule}?", abort=True, err=True)
    with context.obj() as client:
        client.delete(f"/schedules/{schedule}", **_if_match(if_version))
    if as_json:
        print_json({"id": schedule, "deleted": True})
    else:
        stdout().print(f"deleted {schedule}", markup=False)


@app.command("trigger")
def trigger(
    context: typer.Context,
    schedule: ScheduleId,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end.")] = False,
    as_json: Json = False,
) -> None:
    """Run a schedule's job now, also while the schedule is disabled; of a fleet, --wait does not wait."""
    with context.obj() as client:
        job = client.post(f"/schedules/{schedule}/trigger")
        if "fleet" not in job:
            conclude(client, job, wait=wait, as_json=as_json)
            return
    print_json(job) if as_json else stdout().print(f"{job['fleet']['total']} adapters", markup=False)
    note(f"follow them: rankwise schedules fleet {schedule}")


@app.command("upcoming")
def upcoming(
    context: typer.Context,
    schedule: ScheduleId,
    number: Annotated[int, typer.Option("-n", "--number", min=1, max=100, help="How many firings to show.")] = 5,
    as_json: Json = False,
) -> None:
    """Show when a schedule fires next, in its own time zone and in yours."""
    with context.obj() as client:
        found = client.get(f"/schedules/{schedule}/upcoming", n=number)
    if as_json:
        print_json(found)
        return
    rows = [(item["local"], moment(item["at"]), item["at"]) for item in found["items"]]
    state = "" if found["enabled"] else " (disabled)"
    stdout().print(table(found["words"] + state, (found["timezone"] or "time zone", "here", "UTC"), rows))


@app.command("firings")
def firings(
    context: typer.Context, schedule: ScheduleId, limit: Limit = 50, cursor: Cursor = None, as_json: Json = False
) -> None:
    """List what came of a schedule, newest first: the job of each firing, or why there is none."""
    with context.obj() as client:
        page = client.get(f"/schedules/{schedule}/firings", limit=limit, cursor=cursor)
    if as_json:
        print_json(page)
        return
    rows = [(moment(item["due_at"]), item["outcome"], item["job_id"], item["detail"]) for item in page["items"]]
    stdout().print(table(None, ("due", "outcome", "job", "detail"), rows))
    note_more(page)


add_to(app)


def parse_document(text: str, option: str) -> dict[str, Any]:
    """The JSON object in `text`, or in the file that `@name` names.

    Raises:
        typer.BadParameter: no such file, or not a JSON object.
    """
    try:
        document = json.loads(Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"can not be read as JSON: {error}", param_hint=option) from error
    if not isinstance(document, dict):
        raise typer.BadParameter(f"must be a JSON object, not {text[:40]!r}", param_hint=option)
    return document


def _trigger(cron: str | None, timezone: str | None, event: Event | None, subject: str | None) -> dict[str, Any] | None:
    """The trigger as the API takes it; None if nothing of it is given."""
    if cron is not None and event is not None:
        raise typer.BadParameter("a schedule has times or an event, not both", param_hint="--event")
    if timezone is not None and cron is None:
        raise typer.BadParameter("belongs to --cron", param_hint="--timezone")
    if subject is not None and event is None:
        raise typer.BadParameter("belongs to --event", param_hint="--subject")
    if cron is not None:
        return {"cron": cron, **({"timezone": timezone} if timezone is not None else {})}
    if event is not None:
        return {"event": event.value, **({"subject": subject} if subject is not None else {})}
    return None


def _policies(overlap: Overlap | None, misfire: Misfire | None) -> dict[str, str]:
    given = {"overlap": overlap, "misfire": misfire}
    return {name: policy.value for name, policy in given.items() if policy is not None}


def _if_match(version: int | None) -> dict[str, dict[str, str]]:
    return {} if version is None else {"headers": {"If-Match": f'"{version}"'}}
