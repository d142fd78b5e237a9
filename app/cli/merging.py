"""`rankwise merge`: merge adapters of the service by id, or files of this machine with no service."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.adapters import DownloadFormat, fetch
from app.cli.client import Client
from app.cli.jobs import conclude
from app.cli.options import Json, TargetEngine, parse_settings, parse_weights, stem
from app.cli.output import note, print_json, stdout
from app.cli.progress import steps
from app.cli.reports import print_report

ADAPTER_PREFIX = "adp_"
Inputs = Annotated[
    list[str],
    typer.Argument(metavar="ADAPTER...", help="Ids of adapters (adp_…), or PEFT folders, archives, .safetensors."),
]
Weights = Annotated[
    list[str] | None,
    typer.Option("--weight", metavar="NAME=NUMBER", help="Weight of an input, named as given or by its stem; else 1."),
]


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for: `inputs` are ids or paths, `weights` is aligned with them."""

    inputs: list[str]
    weights: list[float]
    method: str
    parameters: dict[str, Any]
    name: str | None
    output: Path | None
    target_engine: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


def merge(
    context: typer.Context,
    inputs: Inputs,
    method: Annotated[str, typer.Option("--method", help="A merge method; `rankwise methods` lists them.")] = "lego",
    rank: Annotated[str | None, typer.Option("--rank", help="Output rank: a number, or what the method takes.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the method.")
    ] = None,
    weights: Weights = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of the merged adapter; needed for files.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the merged adapter.")] = None,
    target_engine: TargetEngine = None,
    convert: Annotated[
        bool, typer.Option("--convert", help="Make adapters of other types (LoHa, DoRA …) plain LoRAs first.")
    ] = False,
    into_base: Annotated[
        bool, typer.Option("--into-base", help="Add the merged ΔW to the base model, and store that as a model.")
    ] = False,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="With --into-base: by name or id; else the adapters' own.")
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="With --into-base: of the model; else as it is.")] = None,
    force: Annotated[bool, typer.Option("--force", help="With --into-base: even if rounding loses much.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end.")] = True,
    device: Annotated[str, typer.Option("--device", help="Device of a merge of files: cpu or cuda:0.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Merge adapters into one."""
    parameters = parse_settings(settings or ())
    if rank is not None:
        if "rank" in parameters:
            raise typer.BadParameter("the rank is given twice", param_hint="--rank")
        parameters["rank"] = int(rank) if rank.isdecimal() else rank
    aligned = aligned_weights(inputs, parse_weights(weights or ()))
    only = {"base_model": base_model, "dtype": dtype, "force": force or None}
    more = {key: value for key, value in only.items() if value is not None}
    if more and not into_base:
        raise typer.BadParameter("goes with --into-base", param_hint=f"--{next(iter(more)).replace('_', '-')}")
    more |= ({"output": "base"} if into_base else {}) | ({"convert": True} if convert else {})
    order = Order(inputs, aligned, method, parameters, name, output, target_engine, more)
    if are_remote(inputs):
        if into_base and output is not None:
            raise typer.BadParameter("is for an adapter; GET /models/{id}/files has the model's", param_hint="-o")
        with context.obj() as client:
            _merge_by_id(client, order, wait, as_json)
        return
    if more:
        raise typer.BadParameter("a merge of files takes neither --into-base nor --convert")
    if output is None:
        raise typer.BadParameter("a merge of files needs a folder to write into", param_hint="-o")
    if not wait:
        raise typer.BadParameter("a merge of files runs here and now", param_hint="--no-wait")
    _merge_files(order, output, device, as_json)


def are_remote(inputs: list[str]) -> bool:
    """Whether the inputs are adapters of the service, and no files.

    Raises:
        typer.BadParameter: both are among them.
    """
    remote = [text for text in inputs if text.startswith(ADAPTER_PREFIX) and not Path(text).exists()]
    if remote and len(remote) < len(inputs):
        raise typer.BadParameter("ids and files can not be mixed: add the files first, or download the adapters")
    return bool(remote)


def aligned_weights(inputs: list[str], named: dict[str, float]) -> list[float]:
    """The weight of each input, 1 unless named; a name is the input's text, its file name, or that without suffix.

    Raises:
        typer.BadParameter: a name that fits no input, or several.
    """
    aligned = [1.0] * len(inputs)
    for name, weight in named.items():
        places = [place for place, text in enumerate(inputs) if name == text]
        places = places or [place for place, text in enumerate(inputs) if name in {Path(text).name, stem(Path(text))}]
        if len(places) != 1:
            raise typer.BadParameter(
                f"{name!r} names {'no input' if not places else 'several inputs'}; inputs: {', '.join(inputs)}",
                param_hint="--weight",
            )
        aligned[places[0]] = weight
    return aligned


def _merge_by_id(client: Client, order: Order, wait: bool, as_json: bool) -> None:
    document = {
        "adapters": [{"id": text, "weight": weight} for text, weight in zip(order.inputs, order.weights, strict=True)],
        "method": order.method,
        "parameters": order.parameters,
        **({"name": order.name} if order.name else {}),
        **({"target_engine": order.target_engine} if order.target_engine else {}),
        **order.more,
    }
    job = conclude(client, client.post("/merge", document), wait=wait, as_json=as_json)
    if job is None:
        return
    if job["result"].get("models"):
        note(f"stored as the base model {job['result']['models'][0]}")
    elif order.output is not None:
        target = fetch(client, job["result"]["adapters"][0], order.output, DownloadFormat.PEFT, unpack=True)
        note(f"written to {target}")


def _merge_files(order: Order, output: Path, device: str, as_json: bool) -> None:
    from app.cli.local_merge import merge_local

    with steps("merge") as advance:
        report = merge_local(
            [Path(text) for text in order.inputs],
            order.weights,
            order.method,
            order.parameters,
            output,
            name=order.name,
            target_engine=order.target_engine,
            device=device,
            progress=advance,
        )
    if as_json:
        print_json({"path": str(output), "report": report})
    else:
        print_report(stdout(), report)
        note(f"written to {output}; load it with PeftModel.from_pretrained(base, {str(output)!r})")
