"""`rankwise adapters push`: have the service send an adapter to a hub, or write it to a bucket as an OCI layout."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from app.cli.job_reports import push_fields
from app.cli.jobs import conclude
from app.cli.options import AdapterId, Json
from app.cli.output import fields, stdout


def push_adapter(
    context: typer.Context,
    adapter: AdapterId,
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A repository of the hub (owner/name), or s3://bucket/layout[:tag].")
    ],
    file_format: Annotated[str, typer.Option("--format", help="As of a download: peft, kohya, gguf …")] = "peft",
    dtype: Annotated[str | None, typer.Option("--dtype", help="Of the factors; else as stored.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="A smaller rank.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch of a repository.")] = None,
    path: Annotated[str | None, typer.Option("--path", help="Folder in a repository.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Everybody may see the repository.")] = False,
    token: Annotated[
        str | None, typer.Option("--token", help="Name of a token in the service's settings, not a token.")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", help="Of the commit.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end.")] = True,
    as_json: Json = False,
) -> None:
    """Send an adapter elsewhere. The service does it, to where its settings allow."""
    hub = {"revision": revision, "path": path, "token": token, "message": message, "private": False if public else None}
    body = {**target_of(target, hub), "format": file_format, "dtype": dtype, "rank": rank}
    with context.obj() as client:
        job = client.post(f"/adapters/{adapter}/push", {key: value for key, value in body.items() if value is not None})
        conclude(client, job, wait=wait, as_json=as_json, show_ended=_show_push)


def _show_push(job: dict[str, Any]) -> None:
    report = job["result"]["report"]
    stdout().print(fields(report["adapter"], push_fields(report)))


def target_of(target: str, hub: dict[str, Any]) -> dict[str, Any]:
    """The place as the service takes it; `hub` are options that only a repository has.

    Raises:
        typer.BadParameter: one of these with a bucket, or a bucket without a folder.
    """
    given = {key: value for key, value in hub.items() if value is not None}
    if not target.startswith("s3://"):
        return {"hub": {"repo": target, **given}}
    if given:
        raise typer.BadParameter("belongs to a repository of the hub", param_hint=f"--{next(iter(given))}")
    bucket, _, place = target.removeprefix("s3://").partition("/")
    prefix, _, tag = place.partition(":")
    if not prefix:
        raise typer.BadParameter("name a folder of the bucket", param_hint="TARGET")
    return {"oci": {"s3": {"bucket": bucket, "prefix": prefix}, **({"tag": tag} if tag else {})}}
