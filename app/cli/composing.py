"""`rankwise compose`: make an image on the service, or, when the scene names files of this machine, here."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli import adapters
from app.cli.adapters import DownloadFormat
from app.cli.client import Client, ProblemError
from app.cli.compose_report import print_compose_report
from app.cli.jobs import conclude
from app.cli.options import Json, plain_name, stem
from app.cli.output import note, print_json, stdout
from app.cli.progress import steps, transfer

if TYPE_CHECKING:
    from app.cli.scene import SceneFile


def compose(
    context: typer.Context,
    scene: Annotated[
        Path,
        typer.Argument(
            metavar="SCENE",
            exists=True,
            dir_okay=False,
            help="A YAML file: a body of POST /compose-image.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="New folder for image, masks and report; or a .png for the image alone."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end.")] = True,
    device: Annotated[str, typer.Option("--device", help="Device of an image made here: cpu or cuda:0.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Compose an image of several adapters.

    A base model that is a folder is used here, with no service. Otherwise the image is a job of the service; adapters
    may still be files, which are uploaded first. A scene with `methods` compares them.
    """
    from app.cli.scene import read_scene  # with the schemas of the service, which `--help` shall not wait for

    found = read_scene(scene)
    if found.model_folder is None:
        with context.obj() as client:
            _compose_remotely(client, found, output, wait, as_json)
        return
    if output is None:
        raise typer.BadParameter("an image that is made here needs a place to be written to", param_hint="-o")
    if not wait:
        raise typer.BadParameter("an image of files is made here and now", param_hint="--no-wait")
    _compose_here(found, output, device, as_json)


def _compose_remotely(client: Client, scene: SceneFile, output: Path | None, wait: bool, as_json: bool) -> None:
    from app.cli.scene import adapters_in

    if output is not None and output.exists():
        raise ProblemError({"code": "exists", "detail": f"{output} is there already", "hint": "choose another -o"})
    body = deepcopy(scene.body)
    uploaded: dict[str, str] = {}
    for item in adapters_in(body):
        name = item.get("adapter")
        if name in scene.adapters:
            if name not in uploaded:
                path = scene.adapters[name]
                uploaded[name] = adapters.upload(client, path, {"name": stem(path)})[0]["id"]
            item["adapter"] = uploaded[name]
    submitted = client.post("/compose-image/compare" if "methods" in body else "/compose-image", body)
    job = conclude(client, submitted, wait=wait, as_json=as_json)
    if job is None or output is None:
        return
    result = job["result"]
    if result["images"]:
        _download(client, result["images"], output)
    else:  # the method yields an adapter
        adapters.fetch(client, result["adapters"][0], output, DownloadFormat.PEFT, unpack=True)
    note(f"written to {output}")


def _download(client: Client, images: list[str], output: Path) -> None:
    """The first image as a PNG; or all images with their evidence, each in a folder of its own if they are several."""
    if output.suffix.lower() == ".png":
        output.parent.mkdir(parents=True, exist_ok=True)
        _file(client, f"/images/{images[0]}/files/image.png", output)
        return
    for number, image_id in enumerate(images):
        image: dict[str, Any] = client.get(f"/images/{image_id}")
        folder = output if len(images) == 1 else output / f"{number}-{plain_name(image['label'])}"
        folder.mkdir(parents=True)
        for file in image["files"]:
            _file(client, file["link"], folder / file["name"])


def _file(client: Client, link: str, target: Path) -> None:
    with transfer(f"download {target.name}", None) as advance:
        _, written = client.download(link, target.parent, advance)
    written.rename(target)


def _compose_here(scene: SceneFile, output: Path, device: str, as_json: bool) -> None:
    from app.cli.local_compose import compose_local

    with steps("compose") as advance:
        report = compose_local(scene, output, device=device, progress=advance)
    if as_json:
        print_json({"path": str(output), "report": report})
        return
    print_compose_report(stdout(), report)
    note(f"written to {output}")
