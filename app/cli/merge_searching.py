"""`rankwise merge-search`: try merges of the service's adapters, measure each on datasets, keep the best."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.adapters import DownloadFormat, fetch
from app.cli.jobs import conclude
from app.cli.merge_comparing import parse_candidate
from app.cli.merging import Inputs, Weights, aligned_weights, are_remote
from app.cli.options import Json, parse_weights
from app.cli.output import note


def merge_search(
    context: typer.Context,
    inputs: Inputs,
    datasets: Annotated[
        list[str],
        typer.Option("--dataset", metavar="DATASET", help="What trials are measured on (dat_…); several count alike."),
    ],
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="METHOD[:NAME=VALUE;...]",
            help="A method to try; a value may be a range, LOW..HIGH, or choices, A|B. Unset, six are tried.",
        ),
    ] = None,
    weights: Weights = None,
    weight_range: Annotated[
        str | None, typer.Option("--weights", metavar="LOW..HIGH", help="Range of every adapter's weight.")
    ] = None,
    ranks: Annotated[
        str | None, typer.Option("--ranks", metavar="A|B", help="Output ranks to try, such as '8|16|r'.")
    ] = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Most trials.")] = 20,
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0, help="No trial begins after so many seconds.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampler.")] = 0,
    metric: Annotated[str, typer.Option("--metric", help="loss, perplexity or exact_match.")] = "loss",
    max_rows: Annotated[
        int | None, typer.Option("--max-rows", min=1, help="Most rows of each dataset that are measured.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the best adapter.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the best adapter.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end.")] = True,
    as_json: Json = False,
) -> None:
    """Search for the merge that does best on data: methods, weights, parameters."""
    aligned = aligned_weights(inputs, parse_weights(weights or ()))
    if not are_remote(inputs):
        raise typer.BadParameter("a search measures on datasets of the service: add the adapters first")
    parameters: dict[str, Any] = {"trials": trials, "seed": seed}
    if methods:
        parameters["methods"] = [_searched(text) for text in methods]
    if weight_range is not None:
        parameters["weights"] = [_range_or_choices(weight_range)]
    if ranks is not None:
        parameters["ranks"] = [_number(part) for part in ranks.split("|")]
    if seconds is not None:
        parameters["seconds"] = seconds
    document = {
        "adapters": [{"id": text, "weight": weight} for text, weight in zip(inputs, aligned, strict=True)],
        "method": "search",
        "parameters": parameters,
        "evaluation": {"datasets": datasets, "metric": metric, **({"max_rows": max_rows} if max_rows else {})},
        **({"name": name} if name else {}),
    }
    with context.obj() as client:
        job = conclude(client, client.post("/merge", document), wait=wait, as_json=as_json)
        if job is not None and output is not None:
            target = fetch(client, job["result"]["adapters"][0], output, DownloadFormat.PEFT, unpack=True)
            note(f"written to {target}")


def _searched(text: str) -> dict[str, Any]:
    """`lego:rank=8|16;scale=0.5..2` → a method with choices and a range."""
    method, parameters = parse_candidate(text)
    return {"method": method, "parameters": {key: _range_or_choices(value) for key, value in parameters.items()}}


def _range_or_choices(value: Any) -> Any:
    """`0.5..2` → a range, `8|16` → choices; any other value is itself."""
    if not isinstance(value, str):
        return value
    low, dots, high = value.partition("..")
    if dots:
        try:
            return {"low": float(low), "high": float(high)}
        except ValueError as error:
            raise typer.BadParameter(f"{value!r} is not of the form LOW..HIGH") from error
    return {"choices": [_number(part) for part in value.split("|")]} if "|" in value else value


def _number(text: str) -> Any:
    """A number, true or false where it reads as one."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
