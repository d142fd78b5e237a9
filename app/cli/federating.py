"""`rankwise federate`: take part in a federated training with rows that stay on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.options import JobId, Json
from app.cli.output import note, print_json
from app.cli.progress import steps

SILENCE_SECONDS = 300.0
"""After which a service that says nothing counts as away. It looks at what was sent before it answers."""


def federate(
    context: typer.Context,
    job: JobId,
    number: Annotated[int, typer.Option("--client", min=0, help="Place among the training's clients, from 0.")],
    base_model: Annotated[
        Path,
        typer.Option("--base-model", exists=True, file_okay=False, help="Folder of the training's base model."),
    ],
    data: Annotated[
        Path, typer.Option("--data", exists=True, dir_okay=False, help="The rows to train on. They are not sent.")
    ],
    device: Annotated[str, typer.Option("--device", help="cpu or cuda:0.")] = "cpu",
    poll: Annotated[float, typer.Option("--poll", min=0.1, max=3600, help="Seconds between two questions.")] = 5.0,
    patience: Annotated[
        float, typer.Option("--patience", min=0, help="Seconds to go on trying when the service does not answer.")
    ] = 600.0,
    tell_loss: Annotated[bool, typer.Option("--tell-loss/--no-tell-loss", help="Send the mean loss too.")] = True,
    as_json: Json = False,
) -> None:
    """Take part in a federated training as one of its remote clients, until it has ended.

    Each round: fetch the common adapter, train it on rows that stay here, send what was trained. Use the API key that
    the training names for this client.
    """
    from app.cli.remote_rounds import RemoteRounds  # with torch, which `--help` shall not wait for

    with context.obj(silence=SILENCE_SECONDS) as client, steps("federate") as advance:
        rounds = RemoteRounds(client, job, number, base_model, data, device, poll, patience, tell_loss, advance)
        ended: dict[str, Any] = rounds.run()
    if as_json:
        print_json(ended)
    else:
        note(f"the training has {ended['training_state']}; {len(ended['given'])} rounds were given")
    if ended["training_state"] != "succeeded":
        raise typer.Exit(1)
