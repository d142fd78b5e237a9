"""`rankwise adapters compatibility`: whether an engine loads an adapter."""

from __future__ import annotations

from typing import Annotated

import typer

from app.cli.options import AdapterId, Json
from app.cli.output import print_json, stdout, table


def compatibility(
    context: typer.Context,
    adapter: AdapterId,
    engine: Annotated[
        str, typer.Option("--engine", help="vllm, diffusers, peft, transformers, kohya, comfy or llama.cpp.")
    ],
    as_json: Json = False,
) -> None:
    """Say whether an engine loads an adapter, and why not. Exit code 1 when it does not."""
    with context.obj() as client:
        found = client.get(f"/adapters/{adapter}/compatibility", engine=engine)
    if as_json:
        print_json(found)
    else:
        rows = [(item["level"], item["rule"], item["message"], item["remedy"]) for item in found["findings"]]
        title = f"{engine} {'loads' if found['loads'] else 'does not load'} it"
        stdout().print(table(title, ("level", "rule", "what", "what to do"), rows))
    if not found["loads"]:
        raise typer.Exit(1)
