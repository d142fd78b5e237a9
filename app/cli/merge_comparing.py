"""`rankwise merge-compare`: the same adapters by several methods, on the service or on files of this machine."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.adapters import DownloadFormat, fetch
from app.cli.jobs import conclude
from app.cli.merging import Inputs, Weights, aligned_weights, are_remote
from app.cli.options import Json, parse_settings, parse_weights, plain_name
from app.cli.output import note, print_json, stdout
from app.cli.progress import steps
from app.cli.reports import print_comparison


class Publish(StrEnum):
    """Which of the merged adapters the service stores."""

    NONE = "none"
    BEST = "best"
    ALL = "all"


def merge_compare(
    context: typer.Context,
    inputs: Inputs,
    candidates: Annotated[
        list[str],
        typer.Option(
            "--candidate",
            metavar="METHOD[:NAME=VALUE;...]",
            help="A merge method with its parameters, such as svd or 'lego:rank=8;seed=1'; give several.",
        ),
    ],
    weights: Weights = None,
    publish: Annotated[
        Publish, typer.Option("--publish", help="Which of the merged adapters the service stores.")
    ] = Publish.NONE,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="Rank by what the candidates do on this dataset (dat_…).")
    ] = None,
    metric: Annotated[str, typer.Option("--metric", help="With --dataset: loss, perplexity or exact_match.")] = "loss",
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="New folder: of files, for every merge, report and pictures; of ids, for the published adapters.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the stored adapter.")] = None,
    device: Annotated[str, typer.Option("--device", help="Device of a comparison of files: cpu or cuda:0.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Merge the same adapters by several methods and show which is nearest to their exact sum."""
    aligned = aligned_weights(inputs, parse_weights(weights or ()))
    parsed = [parse_candidate(text) for text in candidates]
    if not are_remote(inputs):
        if output is None:
            raise typer.BadParameter("a comparison of files needs a folder to write into", param_hint="-o")
        if dataset is not None:
            raise typer.BadParameter("a comparison of files has no service that keeps datasets", param_hint="--dataset")
        _compare_files([Path(text) for text in inputs], aligned, parsed, output, device, as_json)
        return
    document = {
        "adapters": [{"id": text, "weight": weight} for text, weight in zip(inputs, aligned, strict=True)],
        "candidates": [{"method": method, "parameters": parameters} for method, parameters in parsed],
        "publish": publish.value,
        **({"evaluation": {"dataset": dataset, "metric": metric}} if dataset else {}),
        **({"name": name} if name else {}),
    }
    with context.obj() as client:
        job = conclude(client, client.post("/merge/compare", document), wait=True, as_json=as_json)
        if job is None or output is None:
            return
        made: list[str] = job["result"]["adapters"]
        for row in job["result"]["report"]["candidates"]:
            if row["adapter"] is not None:
                target = fetch(
                    client, made[row["adapter"]], output / plain_name(row["label"]), DownloadFormat.PEFT, unpack=True
                )
                note(f"written to {target}")


def parse_candidate(text: str) -> tuple[str, dict[str, Any]]:
    """`lego:rank=8;seed=1` → ("lego", {"rank": 8, "seed": 1})."""
    method, _, settings = text.partition(":")
    return method, parse_settings([part for part in settings.split(";") if part.strip()])


def _compare_files(
    inputs: list[Path],
    weights: list[float],
    candidates: list[tuple[str, dict[str, Any]]],
    output: Path,
    device: str,
    as_json: bool,
) -> None:
    from app.cli.local_merge import compare_local

    with steps("compare") as advance:
        report = compare_local(inputs, weights, candidates, output, device=device, progress=advance)
    if as_json:
        print_json({"path": str(output), "report": report})
        return
    print_comparison(stdout(), report)
    note(f"written to {output}")
