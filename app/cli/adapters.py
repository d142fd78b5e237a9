"""`rankwise adapters`: upload, list, look at, download, delete, trace."""

from __future__ import annotations

import tempfile
import zipfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.tree import Tree

from app.cli.adapter_summary import summary
from app.cli.client import Client, ProblemError
from app.cli.compatibility import compatibility
from app.cli.importing import import_adapter
from app.cli.job_reports import conversion_fields
from app.cli.jobs import conclude
from app.cli.made_again import show_recipe
from app.cli.options import AdapterId, Cursor, Json, Limit, stem
from app.cli.output import fields, moment, note_more, print_json, size, stdout, table
from app.cli.progress import transfer
from app.cli.pushing import push_adapter
from app.cli.resuming import packed, upload_in_pieces
from artifacts.errors import FormatUnknown, RequestInvalid
from artifacts.formats.gguf import BASE_CONFIG

app = typer.Typer(help="Adapters: upload, list, look at, download, delete, trace.", no_args_is_help=True)
app.command("compatibility")(compatibility)
app.command("import")(import_adapter)
app.command("push")(push_adapter)
CONFIG_FILE = "adapter_config.json"


class DownloadFormat(StrEnum):
    PEFT = "peft"
    SAFETENSORS = "safetensors"
    DIFFUSERS = "diffusers"
    KOHYA = "kohya"
    COMFY = "comfy"
    GGUF = "gguf"


class DownloadDtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def files_of(path: Path) -> list[Path]:
    """What to send of a path: the file itself, the adapter's own files of a PEFT directory, or the one safetensors or
    GGUF file of a folder, with the base model's config.json if that is there.

    Raises:
        FormatUnknown: a directory without adapter_config.json, and not with one safetensors file.
        RequestInvalid: nothing there.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise RequestInvalid(f"There is no file or folder {str(path)!r}.")
    beside = [file for file in (path / "README.md", path / BASE_CONFIG) if file.is_file()]
    if not (path / CONFIG_FILE).is_file():
        single = sorted(path.glob("*.safetensors"))
        if len(single) == 1 and not single[0].stem.startswith("adapter_model"):  # PEFT's weights need their config
            return single
        if not single and len(ggufs := sorted(path.glob("*.gguf"))) == 1:
            return [*ggufs, *beside]
        raise FormatUnknown(
            f"{path} holds no {CONFIG_FILE}.",
            hint="Give the folder that PEFT's save_pretrained wrote, an archive of it, or a .safetensors or .gguf.",
        )
    weights = sorted(path.glob("adapter_model.*"))
    safe = [file for file in weights if file.suffix == ".safetensors"]
    return [path / CONFIG_FILE, *(safe or weights), *beside]


def upload(client: Client, path: Path, form: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Send one adapter with a progress bar. Returns it, and whether it is new."""
    files = files_of(path)
    with transfer(f"upload {path.name}", sum(file.stat().st_size for file in files)) as advance:
        return client.upload(files, form, lambda count: advance(count, None))


def upload_resumably(client: Client, path: Path, form: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """As `upload`; started again after an interruption, it goes on where that was."""
    with tempfile.TemporaryDirectory(prefix="rankwise-upload-") as folder:
        file = packed(files_of(path), Path(folder), stem(path))
        with transfer(f"upload {path.name}", file.stat().st_size) as advance:
            return upload_in_pieces(client, file, form, lambda count: advance(count, None))


@app.command("add")
def add(
    context: typer.Context,
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="PEFT folders, archives (.zip, .tar, .tar.gz) or .safetensors."),
    ],
    name: Annotated[str | None, typer.Option("--name", help="Name; the file's or folder's own unless given.")] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Registered base model, by name or id.")
    ] = None,
    description: Annotated[str | None, typer.Option("--description", help="A line about it.")] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="A tag; may be given several times.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Send in pieces; started again, go on where it was interrupted.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload adapters. The same content again gives the adapter that is there."""
    if name and len(paths) > 1:
        raise typer.BadParameter("one name for several adapters", param_hint="--name")
    answers = []
    with context.obj() as client:
        for path in paths:
            form = {"name": name or stem(path), "base_model": base_model, "tags": tag}
            form["description"] = description
            send = upload_resumably if resume else upload
            adapter, new = send(client, path, {key: value for key, value in form.items() if value})
            answers.append(adapter)
            if not as_json:
                stdout().print(fields(f"{'added' if new else 'was there'}: {path}", summary(adapter)))
    if as_json:
        print_json(answers[0] if len(answers) == 1 else answers)


@app.command("list")
def list_adapters(
    context: typer.Context,
    base_model: Annotated[str | None, typer.Option("--base-model", help="Only those of this base model.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="Only this kind: lora, rslora, dora …")] = None,
    tag: Annotated[str | None, typer.Option("--tag", help="Only those with this tag.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Only those with this in their name.")] = None,
    sha256: Annotated[str | None, typer.Option("--sha256", help="Only those with these weights or this file.")] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
    as_json: Json = False,
) -> None:
    """List adapters, newest first."""
    with context.obj() as client:
        page = client.get(
            "/adapters",
            base_model=base_model,
            method=method,
            tag=tag,
            name=name,
            sha256=sha256,
            limit=limit,
            cursor=cursor,
        )
    if as_json:
        print_json(page)
        return
    rows = [
        (
            item["id"],
            item["name"],
            item.get("method"),
            item.get("rank"),
            item.get("base_model"),
            size(item.get("size")),
            item.get("origin"),
            moment(item.get("created_at")),
        )
        for item in page["items"]
    ]
    stdout().print(table(None, ("id", "name", "method", "#rank", "base model", "#size", "origin", "created"), rows))
    note_more(page)


@app.command("get")
def get(context: typer.Context, adapter: AdapterId, as_json: Json = False) -> None:
    """Show one adapter with its intake report."""
    with context.obj() as client:
        found = client.get(f"/adapters/{adapter}")
    if as_json:
        print_json(found)
        return
    stdout().print(fields(found["name"], summary(found)))
    files = [(file["path"], size(file["size"]), file["sha256"]) for file in found.get("files") or ()]
    if files:
        stdout().print(table("files", ("path", "#size", "sha256"), files))


@app.command("download")
def download(
    context: typer.Context,
    adapter: AdapterId,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write into.")] = Path(),
    file_format: Annotated[
        DownloadFormat,
        typer.Option("--format", help="peft: a PEFT folder; safetensors: one file; or the names that others use."),
    ] = DownloadFormat.PEFT,
    rank: Annotated[
        int | None,
        typer.Option("--rank", help="A smaller rank: as it was trained with dylora, else the nearest of that rank."),
    ] = None,
    dtype: Annotated[DownloadDtype | None, typer.Option("--dtype", help="Of the factors; else as stored.")] = None,
    archive: Annotated[bool, typer.Option("--zip", help="Keep the zip instead of unpacking it.")] = False,
    as_json: Json = False,
) -> None:
    """Download an adapter; a PEFT folder is unpacked, ready for `PeftModel.from_pretrained`."""
    with context.obj() as client:
        target = fetch(client, adapter, output, file_format, rank=rank, dtype=dtype, unpack=not archive)
    if as_json:
        print_json({"id": adapter, "path": str(target)})
    else:
        stdout().print(str(target), markup=False)


def fetch(
    client: Client,
    adapter: str,
    output: Path,
    file_format: DownloadFormat,
    *,
    rank: int | None = None,
    dtype: DownloadDtype | None = None,
    unpack: bool,
) -> Path:
    """Download into the folder `output` and return what was written; nothing partial is left at its final name.

    Raises:
        ProblemError: unknown adapter, a format or rank that it can not have, or the target exists.
    """
    wanted = {"format": file_format.value} | ({} if rank is None else {"rank": rank})
    wanted |= {} if dtype is None else {"dtype": dtype.value}
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=output) as scratch:
        with transfer(f"download {adapter}", None) as advance:
            name, file = client.download(f"/adapters/{adapter}/download", Path(scratch), advance, **wanted)
        unpacked = unpack and file_format is DownloadFormat.PEFT
        target = output / (Path(name).stem if unpacked else name)
        if target.exists():
            raise ProblemError({"code": "exists", "detail": f"{target} is there already", "hint": "choose another -o"})
        if unpacked:
            with zipfile.ZipFile(file) as archive:
                archive.extractall(Path(scratch) / "unpacked")
            _single_root(Path(scratch) / "unpacked").rename(target)
        else:
            file.rename(target)
    return target


@app.command("cut")
def cut(
    folder: Annotated[Path, typer.Argument(help="PEFT folder, or one .safetensors file, trained with dylora.")],
    rank: Annotated[int, typer.Option("--rank", help="One of the ranks that it was trained for.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="New folder to write.")],
    as_json: Json = False,
) -> None:
    """Write the adapter of a smaller rank inside one that was trained for that. Needs no service."""
    from artifacts.layout import read_layout
    from artifacts.rank_cut import write_cut

    files_of(folder)  # says what is missing
    layout = read_layout(folder)
    if output.exists():
        raise ProblemError({"code": "exists", "detail": f"{output} is there already", "hint": "choose another -o"})
    write_cut(layout, rank, output)
    if as_json:
        print_json({"path": str(output), "rank": rank})
    else:
        stdout().print(str(output), markup=False)


def _single_root(folder: Path) -> Path:
    """The folder that holds the adapter: the only sub-folder of an archive that has one, else the folder itself."""
    entries = list(folder.iterdir())
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else folder


@app.command("delete")
def delete(
    context: typer.Context,
    adapter: AdapterId,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Delete an adapter. One that others descend from keeps its place in their lineage."""
    if not yes:
        typer.confirm(f"delete {adapter}?", abort=True, err=True)
    with context.obj() as client:
        client.delete(f"/adapters/{adapter}")
    if as_json:
        print_json({"id": adapter, "deleted": True})
    else:
        stdout().print(f"deleted {adapter}", markup=False)


@app.command("waive")
def waive(
    context: typer.Context,
    adapter: AdapterId,
    reason: Annotated[str | None, typer.Option("--reason", help="Why it need not outlive its base model.")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take it back.")] = False,
    as_json: Json = False,
) -> None:
    """Accept that an adapter goes out of use with its base model, which it then no longer keeps."""
    if undo == (reason is not None):
        raise typer.BadParameter("give either --reason or --undo")
    with context.obj() as client:
        if undo:
            client.delete(f"/adapters/{adapter}/waiver")
        else:
            client.put(f"/adapters/{adapter}/waiver", {"reason": reason})
        found = client.get(f"/adapters/{adapter}")
    print_json(found) if as_json else stdout().print(fields(found["name"], summary(found)))


@app.command("lineage")
def lineage(context: typer.Context, adapter: AdapterId, as_json: Json = False) -> None:
    """Show what an adapter was made from and what was made from it."""
    with context.obj() as client:
        found = client.get(f"/adapters/{adapter}/lineage")
    if as_json:
        print_json(found)
        return
    names = {node["id"]: node for node in found["nodes"]}
    stdout().print(_branch("made from", adapter, names, found["edges"], ("child", "parent")))
    stdout().print(_branch("made into", adapter, names, found["edges"], ("parent", "child")))


@app.command("convert")
def convert(
    context: typer.Context,
    adapter: AdapterId,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Of the result, at most; else exact.")] = None,
    to: Annotated[
        str, typer.Option("--to", help="lora; of an LQ-LoRA also unpacked_lora and merged, which write a model.")
    ] = "lora",
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", help="Base model by id or name, for DoRA, OFT, IA3, VeRA …; else its own."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of the model: float32 (exact), bfloat16 or float16.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option("--max-error", min=0, max=1, help="Fail if a larger share of the change is lost.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the converted adapter, or merged model.")] = None,
    as_json: Json = False,
) -> None:
    """Convert an adapter of another type (AdaLoRA, DoRA, LoHa, OFT …) to a plain LoRA, an LQ-LoRA also to a model."""
    wanted = {"to": to, "rank": rank, "max_error": max_error, "base_model": base_model, "dtype": dtype, "name": name}
    body = {key: value for key, value in wanted.items() if value is not None}
    with context.obj() as client:
        job = client.post(f"/adapters/{adapter}/convert", body)
        conclude(client, job, wait=True, as_json=as_json, show_ended=_show_conversion)


def _show_conversion(job: dict[str, Any]) -> None:
    made = [*job["result"]["adapters"], *job["result"].get("models", [])]
    stdout().print(fields(" on ".join(made), conversion_fields(job["result"]["report"])))


@app.command("recipe")
def recipe(context: typer.Context, adapter: AdapterId, as_json: Json = False) -> None:
    """Show the call that makes an adapter again, and whether it gives the same bytes."""
    with context.obj() as client:
        found = client.get(f"/adapters/{adapter}/recipe")
    show_recipe(adapter, found, as_json=as_json)


def _branch(
    title: str, root: str, nodes: dict[str, Any], edges: list[dict[str, Any]], direction: tuple[str, str]
) -> Tree:
    """The tree from `root` along the edges; an adapter that is reached twice is drawn twice, as it was used twice."""
    source, target = direction

    def label(identifier: str) -> str:
        node = nodes.get(identifier, {})
        gone = " (deleted)" if node.get("deleted") else ""
        return f"{identifier}  {node.get('name', '')}{gone}"

    def grow(tree: Tree, identifier: str) -> None:
        for edge in edges:
            if edge[source] == identifier:
                recipe = edge.get("recipe") or {}
                how = f"  [{recipe['method']}]" if recipe.get("method") else ""
                grow(tree.add(label(edge[target]).replace("[", r"\[") + how.replace("[", r"\[")), edge[target])

    tree = Tree(f"[bold]{title}[/bold]  " + label(root).replace("[", r"\["))
    grow(tree, root)
    return tree
