"""`rankwise adapters import`: have the service fetch an adapter from a hub, a URL or a bucket."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from app.cli.job_reports import import_fields
from app.cli.jobs import conclude
from app.cli.options import Json
from app.cli.output import fields, stdout


def import_adapter(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A repository of the hub (owner/name), an https:// URL, or s3://bucket/key-or-folder/.",
        ),
    ],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a repository.")] = None,
    path: Annotated[str | None, typer.Option("--path", help="File or folder in a repository.")] = None,
    token: Annotated[
        str | None, typer.Option("--token", help="Name of a token in the service's settings, not a token.")
    ] = None,
    sha256: Annotated[str | None, typer.Option("--sha256", help="Of the one file; another one is refused.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name; else after where it is from.")] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Registered base model, by name or id.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="A tag; may be given several times.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end.")] = True,
    as_json: Json = False,
) -> None:
    """Fetch an adapter from elsewhere. The service does it, from where its settings allow."""
    place = place_of(source, {"revision": revision, "path": path, "token": token})
    wanted = {"name": name, "base_model": base_model, "tags": tag}
    body = {"source": {**place, **({"sha256": sha256} if sha256 else {})}}
    with context.obj() as client:
        job = client.post("/adapters/import", body | {key: value for key, value in wanted.items() if value})
        conclude(client, job, wait=wait, as_json=as_json, show_ended=_show_import)


def _show_import(job: dict[str, Any]) -> None:
    stdout().print(fields(job["result"]["adapters"][0], import_fields(job["result"]["report"])))


def place_of(source: str, hub: dict[str, str | None]) -> dict[str, Any]:
    """The place as the service takes it; `hub` are options that only a repository has.

    Raises:
        typer.BadParameter: one of these with another source.
    """
    given = {key: value for key, value in hub.items() if value is not None}
    scheme, separator, rest = source.partition("://")
    if not separator:
        return {"hub": {"repo": source, **given}}
    if given:
        raise typer.BadParameter("belongs to a repository of the hub", param_hint=f"--{next(iter(given))}")
    if scheme != "s3":
        return {"url": source}
    bucket, _, key = rest.partition("/")
    return {"s3": {"bucket": bucket, "prefix" if key.endswith("/") else "key": key}}
