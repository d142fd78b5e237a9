"""`rankwise demo`: the options of the demonstration; what it does is in `app.demo`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer


def demo(
    directory: Annotated[
        Path, typer.Option("--directory", help="Where its database, files and results go; emptied first.")
    ] = Path("rankwise-data/demo"),
    items: Annotated[int, typer.Option("--items", min=1, help="Held-out items that each model is scored on.")] = 32,
    keep_serving: Annotated[
        bool, typer.Option("--keep-serving", help="Leave the service up until you press Ctrl-C.")
    ] = False,
) -> None:
    """Start the service, upload the example adapters, merge them over HTTP, score what came out."""
    from app.demo import Demonstration

    # As Ctrl-C does: the service that it started must not outlive it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    Demonstration(directory.resolve(), items=items, keep_serving=keep_serving).run()
