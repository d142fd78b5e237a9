"""`rankwise workers`: the servers, their device slots, and what each does."""

from __future__ import annotations

import typer

from app.cli.options import Json
from app.cli.output import moment, note, print_json, stdout, table


def workers(context: typer.Context, as_json: Json = False) -> None:
    """Show the device slots of all servers: what runs on each, and which base models its worker holds."""
    with context.obj() as client:
        found = client.get("/workers")
    if as_json:
        print_json(found)
        return
    for server in found["items"]:
        rows = [
            (
                slot["name"],
                slot.get("host"),
                slot["state"],
                slot.get("job_id"),
                slot.get("attempt"),
                ", ".join(slot.get("warm") or ()),
                slot.get("problem"),
            )
            for slot in server["slots"]
        ]
        title = f"{server['id']} on {server['host']} ({server['pool']}), seen {moment(server['seen_at'])}"
        stdout().print(table(title, ("slot", "host", "state", "job", "#attempt", "warm", "problem"), rows))
    if not found["items"]:
        note("no server with a pool is up")
