"""`rankwise schedules fleet` and `plan`: how far a fleet of transfers is, and what one would do."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

import typer

from app.cli.options import Cursor, Json, Limit
from app.cli.output import duration, fields, moment, note, note_more, print_json, stdout, table

ScheduleId = Annotated[str, typer.Argument(metavar="SCHEDULE", help="A schedule's id (sch_…).")]


def add_to(app: typer.Typer) -> None:
    """Register the commands with `rankwise schedules`."""
    app.command("fleet")(fleet)
    app.command("plan")(plan_fleet)


def fleet(
    context: typer.Context,
    schedule: ScheduleId,
    occurrence: Annotated[
        str | None, typer.Argument(metavar="FIRING", help="A firing's occurrence; the newest fleet unless given.")
    ] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
    as_json: Json = False,
) -> None:
    """Show what a firing has made of each adapter: its job, the gate's verdict, the new adapter."""
    path = f"/schedules/{schedule}/firings"
    with context.obj() as client:
        if occurrence is None:
            newest = client.get(path, limit=200)["items"]
            occurrence = next((item["occurrence"] for item in newest if item["outcome"] == "fleet"), None)
        if occurrence is None:
            raise typer.BadParameter(f"none of the newest firings of {schedule} made a fleet", param_hint="SCHEDULE")
        found = client.get(f"{path}/{quote(occurrence, safe='')}", limit=limit, cursor=cursor)
    if as_json:
        print_json(found)
        return
    counts = found["fleet"] or {}
    told = {
        "due": moment(found["due_at"]),
        "outcome": found["outcome"],
        "detail": found["detail"],
        "job": found["job_id"],
        "adapters": counts.get("total"),
        "states": _counted(counts.get("states")),
        "verdicts": _counted(counts.get("verdicts")),
    }
    stdout().print(fields(occurrence, told))
    if found["items"]:
        columns = ("adapter", "name", "state", "verdict", "new adapter", "job", "detail")
        names = ("adapter", "adapter_name", "state", "verdict", "new_adapter", "job_id", "detail")
        stdout().print(table(None, columns, [[item[name] for name in names] for item in found["items"]]))
    note_more(found)


def plan_fleet(context: typer.Context, schedule: ScheduleId, as_json: Json = False) -> None:
    """Show which adapters a schedule's fleet would move now, which not and why, and what it would cost."""
    with context.obj() as client:
        plan = client.post(f"/schedules/{schedule}/dry-run")
    if as_json:
        print_json(plan)
        return
    told = {
        "adapters": plan["total"],
        "would move": plan["moves"],
        "would not": _counted(plan["reasons"]),
        "tokens at most": _counted({name.removesuffix("_tokens"): n for name, n in plan["cost"].items() if n}),
        "time": "unknown" if plan["seconds"] is None else duration(plan["seconds"]),
    }
    stdout().print(fields(schedule, told))
    rows = [(item["adapter"], item["adapter_name"], item["moves"], item["detail"]) for item in plan["items"]]
    if rows:
        stdout().print(table(None, ("adapter", "name", "moves", "why not"), rows))
    if plan["truncated"]:
        note(f"the first {len(rows)} of {plan['total']} were looked at")


def parse_window(text: str) -> dict[str, str] | None:
    """`22:00-06:00`, or with a time zone `22:00-06:00@Europe/Berlin`; None for `always`.

    Raises:
        typer.BadParameter: no dash in it. The times are the service's to check.
    """
    if text == "always":
        return None
    hours, _, zone = text.partition("@")
    start, dash, end = hours.partition("-")
    if not dash:
        raise typer.BadParameter("must look like 22:00-06:00, or be always", param_hint="--window")
    return {"from": start.strip(), "to": end.strip(), **({"timezone": zone} if zone else {})}


def _counted(counts: dict[str, Any] | None) -> str | None:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items()) if counts else None
