"""`rankwise adapters compatibility`: whether an engine loads an adapter, by its rules or by loading it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from app.cli.client import Client
from app.cli.options import AdapterId, Json
from app.cli.output import fields, print_json, stdout, table
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
        stdout().print(fields(f"{engine}: {found['verdict']}", _summary(found)))
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


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    """The fields of a check's report that a person looks for first."""
    base = report["base_model"]
    built = "layers of the adapter's own sizes" if base["built_from"] == "skeleton" else base["class"]
    shown: dict[str, Any] = {"loaded into": f"{base['name']} ({built})" if base["name"] else built}
    if report["refusal"] is not None:
        shown["refused"] = f"{report['refusal']['type']}: {report['refusal']['message']}"
    else:
        modules, scaling = report["modules"], report["scaling"]
        shown["modules with their numbers"] = f"{modules['loaded']} of {modules['of_adapter']}"
        shown["not loaded"] = modules["not_loaded"] or None
        shown["left out of the file"] = report["unexpected"]["names"] or None
        shown["made up by the engine"] = report["missing"]["names"] or None
        shown["rank and scaling"] = (
            f"{scaling['compared'] - scaling['different']} of {scaling['compared']} as in the file"
        )
    return shown | {"it said": report["warnings"] or None}
