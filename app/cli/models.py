"""`rankwise models`: base models that adapters belong to."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.job_reports import quantised_fields
from app.cli.jobs import conclude
from app.cli.made_again import show_recipe
from app.cli.options import Cursor, Json, Limit
from app.cli.output import fields, moment, note, note_more, print_json, stdout, table

app = typer.Typer(help="Base models: register, list, look at, deprecate, remove.", no_args_is_help=True)
ModelId = Annotated[str, typer.Argument(metavar="MODEL", help="A base model's id (mdl_…).")]


def summary(model: dict[str, Any]) -> dict[str, Any]:
    """The fields of a base model that a person looks for first, in order."""
    return {
        "id": model["id"],
        "name": model["name"],
        "source": model.get("source"),
        "location": model.get("location"),
        "revision": model.get("revision"),
        "architecture": model.get("architecture"),
        "pipeline": model.get("pipeline"),
        "quantised": (model.get("quantisation") or {}).get("quant_method"),
        "parameters": f"{model['parameter_count']:,}" if model.get("parameter_count") else None,
        "weights digest": model.get("weights_digest"),
        "tokenizer digest": model.get("tokenizer_digest"),
        "fingerprint": model.get("fingerprint_digest"),
        "created": moment(model.get("created_at")),
        "deprecated": model.get("deprecated_at") and moment(model["deprecated_at"]),
        "reason": model.get("deprecation_reason"),
        "use instead": model.get("successor"),
        "to be removed": None if model.get("removed_at") else model.get("remove_at") and moment(model["remove_at"]),
        "removed": model.get("removed_at") and moment(model["removed_at"]),
        "needed by": (model.get("removal") or {}).get("blocked_by"),
    }


@app.command("add")
def add(
    context: typer.Context,
    location: Annotated[
        str,
        typer.Argument(metavar="LOCATION", help="A hub id, or a folder on the server under one of its model roots."),
    ],
    name: Annotated[str | None, typer.Option("--name", help="Name; the location's own unless given.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Commit of a hub model.")] = None,
    hub: Annotated[
        bool | None,
        typer.Option("--hub/--path", help="What the location is; a folder if it is absolute, else a hub id."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Register a base model; its folder is read on the server, never sent."""
    from_hub = not Path(location).is_absolute() if hub is None else hub
    document = {"hub_id" if from_hub else "path": location, "name": name, "revision": revision}
    with context.obj() as client:
        model = client.post("/models", {key: value for key, value in document.items() if value is not None})
    print_json(model) if as_json else stdout().print(fields(model["name"], summary(model)))


@app.command("list")
def list_models(context: typer.Context, limit: Limit = 50, cursor: Cursor = None, as_json: Json = False) -> None:
    """List base models, newest first."""
    with context.obj() as client:
        page = client.get("/models", limit=limit, cursor=cursor)
    if as_json:
        print_json(page)
        return
    rows = [
        (
            item["id"],
            item["name"],
            item.get("source"),
            item.get("architecture"),
            "removed" if item.get("removed_at") else "deprecated" if item.get("deprecated_at") else "in use",
            moment(item.get("created_at")),
        )
        for item in page["items"]
    ]
    stdout().print(table(None, ("id", "name", "source", "architecture", "state", "created"), rows))
    note_more(page)


@app.command("get")
def get(context: typer.Context, model: ModelId, as_json: Json = False) -> None:
    """Show one base model."""
    with context.obj() as client:
        found = client.get(f"/models/{model}")
    print_json(found) if as_json else stdout().print(fields(found["name"], summary(found)))


@app.command("recipe")
def recipe(context: typer.Context, model: ModelId, as_json: Json = False) -> None:
    """Show the call that makes a merged base model again, and whether it gives the same bytes."""
    with context.obj() as client:
        found = client.get(f"/models/{model}/recipe")
    show_recipe(model, found, as_json=as_json)


@app.command("deprecate")
def deprecate(
    context: typer.Context,
    model: ModelId,
    at: Annotated[datetime | None, typer.Option("--at", help="From when, UTC; now unless given.")] = None,
    remove_at: Annotated[
        datetime | None, typer.Option("--remove-at", help="When it is removed, UTC, if nothing depends on it then.")
    ] = None,
    successor: Annotated[
        str | None, typer.Option("--successor", metavar="MODEL", help="The base model to use instead.")
    ] = None,
    reason: Annotated[str | None, typer.Option("--reason", help="Told to whoever still uses it.")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take it back.")] = False,
    as_json: Json = False,
) -> None:
    """Say that a base model is on its way out."""
    if undo and (at or remove_at or successor or reason):
        raise typer.BadParameter("--undo takes no other option", param_hint="--undo")
    with context.obj() as client:
        if undo:
            found = client.patch(f"/models/{model}", {"deprecated_at": None, "remove_at": None})
        else:
            document = {
                "deprecate_at": at and _utc(at),
                "remove_at": remove_at and _utc(remove_at),
                "successor": successor,
                "reason": reason,
            }
            given = {name: value for name, value in document.items() if value is not None}
            found = client.post(f"/models/{model}/deprecate", given)
    print_json(found) if as_json else stdout().print(fields(found["name"], summary(found)))


@app.command("quantize")
def quantize(
    context: typer.Context,
    model: ModelId,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Of the low-rank part beside the few bits.")] = 64,
    bits: Annotated[
        float | None, typer.Option("--bits", help="Budget of bits per weight, such as 2.75; else --preset.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="nf3 or nf4: one format for all; nf4 without --bits.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the quantised model.")] = None,
    as_json: Json = False,
) -> None:
    """Make a base model one in a few bits, on which the method lq-lora trains."""
    parameters = {"rank": rank, "budget_bits": bits, "preset": preset}
    body = {"parameters": {key: value for key, value in parameters.items() if value is not None}, "name": name}
    with context.obj() as client:
        job = client.post(f"/models/{model}/quantize", body)
        conclude(client, job, wait=True, as_json=as_json, show_ended=_show_quantised)


def _show_quantised(job: dict[str, Any]) -> None:
    stdout().print(fields(job["result"]["models"][0], quantised_fields(job["result"]["report"])))


@app.command("remove")
def remove(
    context: typer.Context,
    model: ModelId,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Let a removed model be used again.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a base model that nothing depends on; what does is listed."""
    if not yes and not undo:
        typer.confirm(f"remove {model}?", abort=True, err=True)
    with context.obj() as client:
        if undo:
            client.patch(f"/models/{model}", {"removed_at": None})
        else:
            client.delete(f"/models/{model}")
        found = client.get(f"/models/{model}")
    print_json(found) if as_json else stdout().print(fields(found["name"], summary(found)))


def _utc(moment_: datetime) -> str:
    return (moment_ if moment_.tzinfo else moment_.replace(tzinfo=UTC)).isoformat()


@app.command("kmers")
def kmer_bert(
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    k: Annotated[int, typer.Option("--k", min=1, max=6, help="Nucleotides of a token.")] = 3,
    layers: Annotated[int, typer.Option("--layers", min=1, max=96, help="Of the encoder.")] = 12,
    width: Annotated[int, typer.Option("--width", min=8, max=8192, help="Of the hidden states.")] = 768,
    heads: Annotated[int, typer.Option("--heads", min=1, max=256, help="Of attention; they divide the width.")] = 12,
    inner: Annotated[int, typer.Option("--inner", min=8, max=32768, help="Of the layers between.")] = 3072,
    positions: Annotated[int, typer.Option("--positions", min=16, max=65536, help="Longest input, tokens.")] = 1536,
    dropout: Annotated[
        float, typer.Option("--dropout", min=0.0, max=0.9, help="Of hidden states and attention.")
    ] = 0.1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the first values.")] = 0,
) -> None:
    """Make a BERT that reads k-mers and has learned nothing: the base model of the task transcript-classification.

    The sizes are those of the published code. Nothing is registered: `rankwise models add FOLDER` does that.
    """
    from train.kmer_bert import KmerBertShape, write_kmer_bert

    count = write_kmer_bert(output, KmerBertShape(k, layers, width, heads, inner, positions, dropout), seed)
    note(f"{count:,} parameters written to {output}")
