"""`rankwise train`: run a recipe on the service, or, when it names files of this machine, here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import adapters, datasets
from app.cli.adapters import DownloadFormat, fetch
from app.cli.client import Client
from app.cli.jobs import conclude
from app.cli.options import Json
from app.cli.output import note, print_json, stdout
from app.cli.progress import steps
from app.cli.train_report import print_train_report
from artifacts.heat_map import write_pictures
from artifacts.layout import WEIGHTS_NAME

if TYPE_CHECKING:
    from app.cli.recipe import Recipe


def train(
    context: typer.Context,
    recipe: Annotated[
        Path,
        typer.Argument(metavar="RECIPE", exists=True, dir_okay=False, help="A YAML file: a body of POST /train."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder of the adapter; needed if the base model is a folder."),
    ] = None,
    transferable: Annotated[
        Path | None,
        typer.Option(
            "--transferable",
            exists=True,
            dir_okay=False,
            help="A YAML file: `transferable` of the body, so that the seeds need not stand in the recipe.",
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end.")] = True,
    device: Annotated[str, typer.Option("--device", help="Device of a training of files: cpu or cuda:0.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Train an adapter.

    A base model that is a folder, with a dataset that is a file, is trained here, with no service. Otherwise the
    training is a job of the service; its dataset may still be a file, which is uploaded first.
    """
    from app.cli.recipe import read_recipe  # with the schemas of the service, which `--help` shall not wait for

    found = read_recipe(recipe, transferable)
    if found.model_folder is None:
        with context.obj() as client:
            _train_remotely(client, found, output, wait, as_json)
        return
    if found.dataset_file is None:
        raise typer.BadParameter("a base model in a folder is trained here, on a dataset that is a file")
    if output is None:
        raise typer.BadParameter("a training of files needs a folder to write into", param_hint="-o")
    if not wait:
        raise typer.BadParameter("a training of files runs here and now", param_hint="--no-wait")
    _train_here(found, output, device, as_json)


def _train_remotely(client: Client, recipe: Recipe, output: Path | None, wait: bool, as_json: bool) -> None:
    body = dict(recipe.body)
    if recipe.dataset_file is not None:
        dataset, _ = datasets.upload(client, recipe.dataset_file, {"name": recipe.dataset_file.stem})
        body["dataset"] = dataset["id"]
    if recipe.adapter_folder is not None:
        adapter, _ = adapters.upload(client, recipe.adapter_folder, {"name": recipe.adapter_folder.name})
        body["continue_from"] = adapter["id"]
    job = conclude(client, client.post("/train", body), wait=wait, as_json=as_json)
    if job is None or output is None:
        return
    if job["result"].get("models"):
        (model,) = job["result"]["models"]
        note(f"the model {model} is a base model of the service; GET /models/{model}/files/… gives its files")
    else:
        adapter_id = job["result"]["adapters"][0]
        # An adapter of images is one file, as diffusers has it.
        in_folder = client.get(f"/adapters/{adapter_id}")["format"] == "peft"
        layout = DownloadFormat.PEFT if in_folder else DownloadFormat.SAFETENSORS
        target = fetch(client, adapter_id, output, layout, unpack=in_folder)
        write_pictures(job["result"]["report"].get("own") or {}, target if in_folder else output)
        note(f"written to {target}")


def _train_here(recipe: Recipe, output: Path, device: str, as_json: bool) -> None:
    from app.cli.local_train import train_local

    with steps("train") as advance:
        report = train_local(recipe, output, device=device, progress=advance)
    if as_json:
        print_json({"path": str(output), "report": report})
        return
    print_train_report(stdout(), report)
    whole = not (output / WEIGHTS_NAME).is_file()
    load = "a model's from_pretrained(" if whole else "PeftModel.from_pretrained(base, "
    note(f"written to {output}; load it with {load}{str(output)!r})")
