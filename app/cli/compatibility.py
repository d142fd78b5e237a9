"""`rankwise adapters compatibility`: whether an engine loads an adapter, by its rules or by loading it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from app.cli.client import Client
from app.cli.job_reports import print_load_check
from app.cli.options import AdapterId, Json
from app.cli.output import print_json, stdout, table
from app.cli.progress import require_success, watch


def compatibility(
    context: typer.Context,
    adapter: AdapterId,
    engine: Annotated[
        str, typer.Option("--engine", help="vllm, diffusers, peft, transformers, kohya, comfy or llama.cpp.")
    ],
    load: Annotated[
        bool, typer.Option("--load", help="Really load it, in a worker: peft, transformers or diffusers.")
    ] = False,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="With --load: base model by id or name; else its own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say whether an engine loads an adapter, and why not. Exit code 1 when it does not."""
    if base_model is not None and not load:
        raise typer.BadParameter("goes with --load", param_hint="--base-model")
    with context.obj() as client:
        if load:
            found = _loaded(client, adapter, {"engine": engine, "base_model": base_model})
        else:
            found = client.get(f"/adapters/{adapter}/compatibility", engine=engine)
    if as_json:
        print_json(found)
    elif load:
        print_load_check(stdout(), found)
    else:
        rows = [(item["level"], item["rule"], item["message"], item["remedy"]) for item in found["findings"]]
        title = f"{engine} {'loads' if found['loads'] else 'does not load'} it"
        stdout().print(table(title, ("level", "rule", "what", "what to do"), rows))
    if not (found["verdict"] == "loads" if load else found["loads"]):
        raise typer.Exit(1)


def _loaded(client: Client, adapter: str, wanted: dict[str, str | None]) -> dict[str, Any]:
    body = {name: value for name, value in wanted.items() if value is not None}
    job = require_success(watch(client, client.post(f"/adapters/{adapter}/load-check", body)["id"]))
    report: dict[str, Any] = job["result"]["report"]
    return report
