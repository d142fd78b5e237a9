"""`rankwise aliases`: names that point to an adapter."""

from __future__ import annotations

from typing import Annotated

import typer

from app.cli.options import Cursor, Json, Limit
from app.cli.output import moment, note, note_more, print_json, stdout, table

app = typer.Typer(help="Aliases: names that point to an adapter.", no_args_is_help=True)
AliasName = Annotated[str, typer.Argument(metavar="NAME", help="The alias.")]


@app.command("set")
def set_alias(
    context: typer.Context,
    name: AliasName,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's id (adp_…).")],
    as_json: Json = False,
) -> None:
    """Point an alias to an adapter; made if it is not there."""
    with context.obj() as client:
        found = client.put(f"/aliases/{name}", {"adapter": adapter})
    print_json(found) if as_json else note(f"{name} points to {found['adapter']} (version {found['version']})")


@app.command("list")
def list_aliases(context: typer.Context, limit: Limit = 50, cursor: Cursor = None, as_json: Json = False) -> None:
    """List aliases, newest first."""
    with context.obj() as client:
        page = client.get("/aliases", limit=limit, cursor=cursor)
    if as_json:
        print_json(page)
        return
    rows = [(item["name"], item["adapter"], item["version"], moment(item["updated_at"])) for item in page["items"]]
    stdout().print(table(None, ("name", "adapter", "#version", "switched"), rows))
    note_more(page)


@app.command("get")
def get(context: typer.Context, name: AliasName, as_json: Json = False) -> None:
    """Show where an alias points, and its switches."""
    with context.obj() as client:
        found = client.get(f"/aliases/{name}")
    if as_json:
        print_json(found)
        return
    rows = [
        (item["version"], item["adapter"], item["job"] or item["created_by"], moment(item["created_at"]))
        for item in found["switches"]
    ]
    stdout().print(table(f"{name}: {found['adapter']}", ("#version", "adapter", "by", "switched"), rows))


@app.command("delete")
def delete(context: typer.Context, name: AliasName) -> None:
    """Delete an alias; its adapter stays."""
    with context.obj() as client:
        client.delete(f"/aliases/{name}")
    note(f"deleted {name}")
