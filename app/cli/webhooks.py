"""`rankwise webhooks`: have a server told that jobs have ended."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from app.cli.options import Cursor, Json, Limit
from app.cli.output import fields, moment, note, note_more, print_json, stdout, table

app = typer.Typer(help="Webhooks: be told that jobs have ended.", no_args_is_help=True)
WebhookId = Annotated[str, typer.Argument(metavar="WEBHOOK", help="A webhook's id (whk_…).")]


def summary(webhook: dict[str, Any]) -> dict[str, Any]:
    """The fields of a webhook that a person looks for first, in order."""
    return {
        "id": webhook["id"],
        "url": webhook["url"],
        "events": webhook["events"],
        "description": webhook.get("description"),
        "enabled": webhook["enabled"],
        "created": moment(webhook.get("created_at")),
    }


@app.command("create")
def create(
    context: typer.Context,
    url: Annotated[str, typer.Argument(metavar="URL", help="Where to send the messages: https://…")],
    event: Annotated[
        list[str] | None,
        typer.Option(
            "--event", help="job.succeeded, job.failed or job.cancelled; may be given several times. All unless given."
        ),
    ] = None,
    description: Annotated[str | None, typer.Option("--description", help="What it is for.")] = None,
    as_json: Json = False,
) -> None:
    """Make a webhook and print the secret that its messages are signed with, once."""
    document: dict[str, Any] = {"url": url, "events": event or ["*"], "description": description or ""}
    with context.obj() as client:
        made = client.post("/webhooks", document)
    if as_json:
        print_json(made)
        return
    stdout().print(made["secret"], markup=False)
    note(f"{made['id']} is told of {', '.join(made['events'])}. The secret is not shown again.")
    note(f"try it: rankwise webhooks test {made['id']}")


@app.command("list")
def list_webhooks(context: typer.Context, limit: Limit = 50, cursor: Cursor = None, as_json: Json = False) -> None:
    """List webhooks, newest first."""
    with context.obj() as client:
        page = client.get("/webhooks", limit=limit, cursor=cursor)
    if as_json:
        print_json(page)
        return
    rows = [
        (item["id"], item["url"], item["events"], item["enabled"], moment(item.get("created_at")))
        for item in page["items"]
    ]
    stdout().print(table(None, ("id", "url", "events", "enabled", "created"), rows))
    note_more(page)


@app.command("get")
def get(context: typer.Context, webhook: WebhookId, as_json: Json = False) -> None:
    """Show one webhook."""
    with context.obj() as client:
        found = client.get(f"/webhooks/{webhook}")
    print_json(found) if as_json else stdout().print(fields(found["id"], summary(found)))


@app.command("enable")
def enable(context: typer.Context, webhook: WebhookId, as_json: Json = False) -> None:
    """Send to it again, e.g. after it had answered 410 Gone."""
    _set_enabled(context, webhook, True, as_json)


@app.command("disable")
def disable(context: typer.Context, webhook: WebhookId, as_json: Json = False) -> None:
    """Send it nothing more; messages that wait are given up."""
    _set_enabled(context, webhook, False, as_json)


@app.command("delete")
def delete(context: typer.Context, webhook: WebhookId, as_json: Json = False) -> None:
    """Delete a webhook; messages that wait are given up."""
    with context.obj() as client:
        client.delete(f"/webhooks/{webhook}")
    print_json({"id": webhook, "deleted": True}) if as_json else stdout().print(f"deleted {webhook}", markup=False)


@app.command("test")
def send_test(context: typer.Context, webhook: WebhookId, as_json: Json = False) -> None:
    """Send a test message; `rankwise webhooks deliveries` tells how it went."""
    with context.obj() as client:
        sent = client.post(f"/webhooks/{webhook}/test")
    print_json(sent) if as_json else stdout().print(f"{sent['id']} is on its way", markup=False)


@app.command("rotate")
def rotate_secret(context: typer.Context, webhook: WebhookId, as_json: Json = False) -> None:
    """Give a webhook a new secret and print it, once."""
    with context.obj() as client:
        rotated = client.post(f"/webhooks/{webhook}/rotate-secret")
    print_json(rotated) if as_json else stdout().print(rotated["secret"], markup=False)


@app.command("deliveries")
def deliveries(
    context: typer.Context,
    webhook: WebhookId,
    state: Annotated[str | None, typer.Option("--state", help="Only pending, delivered or failed.")] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
    as_json: Json = False,
) -> None:
    """List the messages to a webhook and how they went, newest first."""
    with context.obj() as client:
        page = client.get(f"/webhooks/{webhook}/deliveries", state=state, limit=limit, cursor=cursor)
    if as_json:
        print_json(page)
        return
    rows = [
        (
            item["id"],
            item["event"],
            item.get("job_id"),
            item["state"],
            item["attempts"],
            item.get("last_status"),
            item.get("last_error"),
            moment(item.get("next_attempt_at")),
        )
        for item in page["items"]
    ]
    columns = ("id", "event", "job", "state", "#tries", "#status", "error", "next try")
    stdout().print(table(None, columns, rows))
    note_more(page)


@app.command("replay")
def replay(
    context: typer.Context,
    webhook: WebhookId,
    delivery: Annotated[str, typer.Argument(metavar="DELIVERY", help="A delivery's id (msg_…).")],
    as_json: Json = False,
) -> None:
    """Send a message again that was delivered or given up."""
    with context.obj() as client:
        sent = client.post(f"/webhooks/{webhook}/deliveries/{delivery}/replay")
    print_json(sent) if as_json else stdout().print(f"{sent['id']} is on its way", markup=False)


def _set_enabled(context: typer.Context, webhook: str, enabled: bool, as_json: bool) -> None:
    with context.obj() as client:
        found = client.patch(f"/webhooks/{webhook}", {"enabled": enabled})
    print_json(found) if as_json else stdout().print(fields(found["id"], summary(found)))
