"""`rankwise datasets`: upload, list, look at, look into, download, delete."""

from __future__ import annotations

import json
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.client import Client, ProblemError
from app.cli.options import Cursor, Json, Limit
from app.cli.output import fields, moment, note, note_more, print_json, size, stdout, table
from app.cli.progress import transfer
from artifacts.errors import RequestInvalid

app = typer.Typer(help="Datasets: upload, list, look at, look into, download, delete.", no_args_is_help=True)
DatasetId = Annotated[str, typer.Argument(metavar="DATASET", help="A dataset's id (dat_…).")]


class DatasetFormat(StrEnum):
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"
    IMAGES = "images"
    FASTA = "fasta"


Format = Annotated[DatasetFormat | None, typer.Option("--format", help="Unless given, by the name or the content.")]


def upload(client: Client, path: Path, form: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Send one dataset with a progress bar. Returns it, and whether it is new.

    Raises:
        RequestInvalid: no such file.
    """
    if not path.is_file():
        raise RequestInvalid(f"There is no file {str(path)!r}.")
    with transfer(f"upload {path.name}", path.stat().st_size) as advance:
        return client.upload([path], form, lambda count: advance(count, None), to="/datasets")


def summary(dataset: dict[str, Any]) -> dict[str, Any]:
    """The fields of a dataset that a person looks for first, in order."""
    return {
        "id": dataset["id"],
        "name": dataset["name"],
        "format": dataset["format"],
        "rows": f"{dataset['rows']:,}",
        "size": size(dataset["size"]),
        "sha256": dataset["sha256"],
        "created": moment(dataset["created_at"]),
        "warnings": dataset.get("warnings"),
    }


def show(title: str, dataset: dict[str, Any]) -> None:
    """Print a dataset: its fields, its columns, and what it can be used for."""
    stdout().print(fields(title, summary(dataset)))
    columns = [(item["name"], item["type"], item["nulls"]) for item in dataset["columns"]]
    stdout().print(table("columns", ("name", "type", "#rows without"), columns))
    tasks = [(item["task"], item["form"], item["usable"], item["reason"] or "") for item in dataset["tasks"]]
    stdout().print(table("tasks", ("task", "form", "usable", "why not"), tasks))


@app.command("add")
def add(
    context: typer.Context,
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="JSON Lines, CSV, FASTA (all also .gz), Parquet or a zip of images."),
    ],
    name: Annotated[str | None, typer.Option("--name", help="Name; the file's own unless given.")] = None,
    file_format: Format = None,
    as_json: Json = False,
) -> None:
    """Upload datasets. Every row is validated; the same file again gives the dataset that is there."""
    if name and len(paths) > 1:
        raise typer.BadParameter("one name for several datasets", param_hint="--name")
    form = {"name": name, "format": file_format and file_format.value}
    answers = []
    with context.obj() as client:
        for path in paths:
            dataset, new = upload(client, path, {key: value for key, value in form.items() if value})
            answers.append(dataset)
            if not as_json:
                show(f"{'added' if new else 'was there'}: {path}", dataset)
    if as_json:
        print_json(answers[0] if len(answers) == 1 else answers)


@app.command("list")
def list_datasets(
    context: typer.Context,
    name: Annotated[str | None, typer.Option("--name", help="Only those with this in their name.")] = None,
    file_format: Annotated[DatasetFormat | None, typer.Option("--format", help="Only those of this format.")] = None,
    sha256: Annotated[str | None, typer.Option("--sha256", help="Only the one with this file.")] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
    as_json: Json = False,
) -> None:
    """List datasets, newest first."""
    chosen = file_format and file_format.value
    with context.obj() as client:
        page = client.get("/datasets", name=name, format=chosen, sha256=sha256, limit=limit, cursor=cursor)
    if as_json:
        print_json(page)
        return
    rows = [
        (item["id"], item["name"], item["format"], item["rows"], size(item["size"]), moment(item["created_at"]))
        for item in page["items"]
    ]
    stdout().print(table(None, ("id", "name", "format", "#rows", "#size", "created"), rows))
    note_more(page)


@app.command("get")
def get(context: typer.Context, dataset: DatasetId, as_json: Json = False) -> None:
    """Show one dataset: its columns, and for each task whether it can serve it."""
    with context.obj() as client:
        found = client.get(f"/datasets/{dataset}")
    print_json(found) if as_json else show(found["name"], found)


@app.command("rows")
def rows(
    context: typer.Context,
    dataset: DatasetId,
    offset: Annotated[int, typer.Option("--offset", min=0, help="How many to leave out at the start.")] = 0,
    limit: Limit = 20,
    as_json: Json = False,
) -> None:
    """Show some rows of a dataset."""
    with context.obj() as client:
        page = client.get(f"/datasets/{dataset}/rows", offset=offset, limit=limit)
    if as_json:
        print_json(page)
        return
    shown = [(item["row"], json.dumps(item["values"], ensure_ascii=False)) for item in page["items"]]
    stdout().print(table(f"{page['total']:,} rows", ("#row", "values"), shown))
    if page.get("next") is not None:
        note(f"more: --offset {page['next']}")


@app.command("download")
def download(
    context: typer.Context,
    dataset: DatasetId,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write into.")] = Path(),
    as_json: Json = False,
) -> None:
    """Download the file of a dataset."""
    output.mkdir(parents=True, exist_ok=True)
    with context.obj() as client, tempfile.TemporaryDirectory(prefix=".download-", dir=output) as scratch:
        with transfer(f"download {dataset}", None) as advance:
            name, file = client.download(f"/datasets/{dataset}/download", Path(scratch), advance)
        target = output / name
        if target.exists():
            raise ProblemError({"code": "exists", "detail": f"{target} is there already", "hint": "choose another -o"})
        file.rename(target)
    print_json({"id": dataset, "path": str(target)}) if as_json else stdout().print(str(target), markup=False)


@app.command("delete")
def delete(
    context: typer.Context,
    dataset: DatasetId,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Delete a dataset. Refused while jobs that wait or run need it."""
    if not yes:
        typer.confirm(f"delete {dataset}?", abort=True, err=True)
    with context.obj() as client:
        client.delete(f"/datasets/{dataset}")
    print_json({"id": dataset, "deleted": True}) if as_json else stdout().print(f"deleted {dataset}", markup=False)
