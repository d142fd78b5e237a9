"""`rankwise transfer` and `rankwise transfers`: move adapters to other bases, and decide on what the gate holds."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import datasets
from app.cli.adapters import DownloadFormat, fetch
from app.cli.client import Client, ProblemError
from app.cli.jobs import conclude
from app.cli.options import Cursor, JobId, Json, Limit, TargetEngine, parse_settings
from app.cli.output import fields, moment, note, note_more, print_json, stdout, table
from app.cli.progress import steps
from app.cli.transfer_report import print_transfer_report

app = typer.Typer(help="Transfers: list, look at, read the report, decide.", no_args_is_help=True)


SeedsFile = Annotated[
    Path | None,
    typer.Option(
        "--seeds",
        exists=True,
        dir_okay=False,
        help="A file with 3 to 50 examples of the task's inputs: one a line, or a JSON list.",
    ),
]
TargetModel = Annotated[
    str, typer.Option("--to", metavar="MODEL", help="The base model to move it to: id or name; of a folder a folder.")
]


Alias = Annotated[
    str | None, typer.Option("--alias", help="An alias of the adapter, to be switched when the gate says pass.")
]


class Decision(Enum):
    """What becomes of an adapter that waits."""

    PUBLISH = "publish"
    DISCARD = "discard"


class Verdict(Enum):
    """What the gate said."""

    PASS = "pass"  # noqa: S105 (no password)
    HOLD = "hold"
    FAIL = "fail"


def transfer(
    context: typer.Context,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's id (adp_…), or its PEFT folder.")],
    target: TargetModel,
    source: Annotated[
        Path | None, typer.Option("--from", exists=True, file_okay=False, help="Of a folder: that of its base model.")
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="A transfer method; `rankwise methods` lists them.")
    ] = "trans-lora",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the method.")
    ] = None,
    seeds: SeedsFile = None,
    template: Annotated[
        str | None, typer.Option("--template", help="How an input becomes a prompt, with {x} in its place.")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="Short name of the task.")] = None,
    holdout: Annotated[
        str | None,
        typer.Option("--holdout", metavar="DATASET", help="Id or file: prompts and completions to measure with."),
    ] = None,
    inputs: Annotated[
        str | None, typer.Option("--inputs", metavar="DATASET", help="Id or file: prompts that were kept.")
    ] = None,
    controls: Annotated[
        list[str] | None, typer.Option("--control", metavar="METHOD", help="A method to measure beside it.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option("--epsilon", help="How far below its rivals it may be.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of all that is drawn.")] = 0,
    name: Annotated[str | None, typer.Option("--name", help="Name of the new adapter.")] = None,
    target_engine: TargetEngine = None,
    alias: Alias = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of the new one; needed for files.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end.")] = True,
    device: Annotated[str, typer.Option("--device", help="Device of a transfer of files: cpu or cuda:0.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Move an adapter to another base model, without its training data.

    An adapter that is a folder is moved here, with no service; an interrupted transfer goes on when started again.
    """
    body: dict[str, Any] = {
        "adapter": adapter,
        "target_model": target,
        "method": method,
        "parameters": parse_settings(settings or ()),
        "seeds": None if seeds is None else read_seeds(seeds),
        "format": None if template is None else {"template": template},
        "task": task,
        "controls": controls,
        "gate": None if epsilon is None else {"epsilon": epsilon},
        "seed": seed,
        "alias": alias,
        "name": name,
        "target_engine": target_engine,
    }
    body = {field: value for field, value in body.items() if value is not None}
    if not adapter.startswith("adp_"):
        if not wait:
            raise typer.BadParameter("a transfer of files runs here and now", param_hint="--no-wait")
        if alias is not None:
            raise typer.BadParameter("only the service has aliases; this adapter is a folder", param_hint="--alias")
        _transfer_files(body, source, output, (holdout, inputs), device, as_json)
        return
    with context.obj() as client:
        for field, given in (("holdout", holdout), ("inputs", inputs)):
            if given is not None:
                body[field] = _dataset(client, given)
        job = conclude(client, client.post("/transfer", body), wait=wait, as_json=as_json)
        if job is None:
            return
        _decided(client, client.get(f"/transfers/{job['id']}"), output)


def _transfer_files(
    body: dict[str, Any],
    source: Path | None,
    output: Path | None,
    rows: tuple[str | None, str | None],
    device: str,
    as_json: bool,
) -> None:
    from app.cli.local_transfer import LocalTransfer, transfer_local
    from app.cli.yaml_file import checked
    from app.schemas.transfer import TransferRequest

    if source is None or output is None:
        raise typer.BadParameter("a transfer of files needs --from, the folder of the adapter's base model, and -o")
    holdout, inputs = (None if given is None else _existing(given, "file") for given in rows)
    checked(Path("the request"), TransferRequest, {**body, "adapter": "adp_" + "0" * 32})
    asked = LocalTransfer(
        _existing(body["adapter"], "folder"), source, _existing(body["target_model"], "folder"), body, holdout, inputs
    )
    with steps("transfer") as advance:
        report = transfer_local(asked, output, device=device, progress=advance)
    if as_json:
        print_json({"path": str(output), "report": report})
        return
    print_transfer_report(stdout(), report)
    note(f"written to {output}; load it with PeftModel.from_pretrained(base, {str(output)!r})")


def _existing(given: str, kind: str) -> Path:
    path = Path(given)
    if not (path.is_file() if kind == "file" else path.is_dir()):
        raise typer.BadParameter(f"{given} is no {kind} of this machine")
    return path


def read_seeds(path: Path) -> list[str]:
    """The seeds in a file: a JSON list of texts, or one a line. No message holds their text.

    Raises:
        typer.BadParameter: it is neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{path} is no text in UTF-8", param_hint="--seeds") from error
    if not text.lstrip().startswith("["):
        return [line for line in text.splitlines() if line.strip()]
    try:
        found = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"{path} begins as JSON and is none", param_hint="--seeds") from error
    if not all(isinstance(item, str) for item in found):
        raise typer.BadParameter(f"{path} is no list of texts", param_hint="--seeds")
    return list(found)


def _dataset(client: Client, given: str) -> str:
    if given.startswith("dat_") and not Path(given).exists():
        return given
    path = Path(given)
    if not path.is_file():
        raise typer.BadParameter(f"{given} is neither a dataset's id nor a file")
    row, _ = datasets.upload(client, path, {"name": path.stem})
    found: str = row["id"]
    return found


def _decided(client: Client, found: dict[str, Any], output: Path | None) -> None:
    """What a person does next."""
    if found["waiting"]:
        note(f"it waits for you: rankwise transfers decide {found['id']} publish")
    if output is None:
        return
    if found["new_adapter"] is None:
        raise ProblemError(
            {
                "code": "not_published",
                "detail": f"no adapter was published: the gate says {found['verdict']}",
                "hint": f"see rankwise transfers report {found['id']}",
            }
        )
    note(f"written to {fetch(client, found['new_adapter'], output, DownloadFormat.PEFT, unpack=True)}")


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """The fields of a transfer that a person looks for first, in order."""
    decision = found["decision"] or {}
    return {
        "id": found["id"],
        "adapter": f"{found['adapter_name']} ({found['adapter']})",
        "from": found["source_model"],
        "to": found["target_model"],
        "method": found["method"],
        "state": found["state"],
        "progress": f"{found['progress']['fraction']:.0%} {found['progress']['message']}".strip(),
        "verdict": found["verdict"],
        "degraded": found["degraded"] or None,
        "waits for a decision": found["waiting"] or None,
        "decision": decision.get("decision"),
        "reason": decision.get("reason"),
        "decided": moment(decision["at"]) if decision else None,
        "new adapter": found["new_adapter"],
        "seeds": (found["seeds"] or {}).get("count"),
        "superseded by": found["superseded_by"],
        "created": moment(found["created_at"]),
        "finished": found["finished_at"] and moment(found["finished_at"]),
    }


@app.command("list")
def list_transfers(
    context: typer.Context,
    adapter: Annotated[str | None, typer.Option("--adapter", help="Only of this adapter.")] = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="MODEL", help="Only from this base model's id.")
    ] = None,
    target: Annotated[str | None, typer.Option("--to", metavar="MODEL", help="Only to this base model's id.")] = None,
    schedule: Annotated[str | None, typer.Option("--schedule", help="Only of this schedule.")] = None,
    verdict: Annotated[Verdict | None, typer.Option("--verdict", help="Only with this verdict.")] = None,
    state: Annotated[str | None, typer.Option("--state", help="Only in this state of the job.")] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
    as_json: Json = False,
) -> None:
    """List transfers, newest first."""
    with context.obj() as client:
        page = client.get(
            "/transfers",
            adapter=adapter,
            source_model=source,
            target_model=target,
            schedule=schedule,
            verdict=None if verdict is None else verdict.value,
            state=state,
            limit=limit,
            cursor=cursor,
        )
    if as_json:
        print_json(page)
        return
    rows = [
        (
            item["id"],
            item["adapter_name"],
            item["method"],
            item["state"],
            item["verdict"],
            "waits" if item["waiting"] else (item["decision"] or {}).get("decision"),
            item["new_adapter"],
            moment(item["created_at"]),
        )
        for item in page["items"]
    ]
    columns = ("id", "adapter", "method", "state", "verdict", "decision", "new adapter", "created")
    stdout().print(table(None, columns, rows))
    note_more(page)


@app.command("show")
def show(context: typer.Context, job: JobId, as_json: Json = False) -> None:
    """Show one transfer."""
    with context.obj() as client:
        found = client.get(f"/transfers/{job}")
    print_json(found) if as_json else stdout().print(fields(found["id"], summary(found)))


@app.command("report")
def report(
    context: typer.Context,
    job: JobId,
    html: Annotated[
        Path | None, typer.Option("--html", dir_okay=False, help="Write the page with plots into this file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a transfer measured."""
    with context.obj() as client:
        if html is not None:
            html.write_text("".join(client.text(f"/transfers/{job}/report", accept="text/html")), encoding="utf-8")
            note(f"written to {html}")
            return
        found = client.get(f"/transfers/{job}/report")
    print_json(found) if as_json else print_transfer_report(stdout(), found["report"])


@app.command("decide")
def decide(
    context: typer.Context,
    job: JobId,
    decision: Annotated[Decision, typer.Argument(help="publish or discard; it is final.")],
    reason: Annotated[str | None, typer.Option("--reason", help="Why; kept with the transfer.")] = None,
    as_json: Json = False,
) -> None:
    """Publish or drop an adapter that the gate holds."""
    body = {"decision": decision.value} | ({} if reason is None else {"reason": reason})
    with context.obj() as client:
        found = client.post(f"/transfers/{job}/decision", body)
    print_json(found) if as_json else stdout().print(fields(found["id"], summary(found)))
