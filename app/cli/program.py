"""The program: all commands in one tree, and how an error ends it (1 for a failure, 2 for wrong usage)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import typer
from rich.text import Text

from app.cli import (
    adapters,
    aliases,
    composing,
    config,
    database,
    datasets,
    demonstration,
    federating,
    jobs,
    keys,
    merge_comparing,
    merge_searching,
    merging,
    methods,
    models,
    schedules,
    service,
    training,
    transferring,
    webhooks,
    workers,
)
from app.cli.client import DEFAULT_SERVER, Client, ProblemError
from app.cli.output import print_problem, remember_json, stderr
from app.version import VERSION
from artifacts.errors import RankwiseError

app = typer.Typer(
    name="rankwise",
    help="Store, merge and hand out LoRA adapters. `rankwise demo` shows it working.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command("serve")(service.serve)
app.command("worker")(service.worker)
app.command("demo")(demonstration.demo)
app.add_typer(adapters.app, name="adapters")
app.add_typer(aliases.app, name="aliases")
app.command("merge")(merging.merge)
app.command("merge-compare")(merge_comparing.merge_compare)
app.command("merge-search")(merge_searching.merge_search)
app.command("compose")(composing.compose)
app.command("train")(training.train)
app.command("federate")(federating.federate)
app.command("transfer")(transferring.transfer)
app.add_typer(transferring.app, name="transfers")
app.add_typer(jobs.app, name="jobs")
app.add_typer(models.app, name="models")
app.add_typer(datasets.app, name="datasets")
app.add_typer(schedules.app, name="schedules")
app.add_typer(webhooks.app, name="webhooks")
app.command("methods")(methods.methods)
app.command("workers")(workers.workers)
app.add_typer(keys.app, name="keys")
app.add_typer(database.app, name="db")
app.add_typer(config.app, name="config")


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"rankwise {VERSION}\n")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    server: Annotated[
        str, typer.Option("--server", envvar="RANKWISE_SERVER", help="Address of the service.")
    ] = DEFAULT_SERVER,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="RANKWISE_API_KEY", show_envvar=True, help="Key to call it with."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    del version
    # Made when a command first needs it: most of the set-up commands never do.
    context.obj = partial(Client, server, api_key)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    remember_json(False)
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="rankwise")
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except ProblemError as error:
        print_problem(error.problem)
    except RankwiseError as error:
        findings = [{"pointer": item.pointer, "message": item.message} for item in error.errors]
        print_problem(
            {"code": error.code, "title": error.title, "detail": error.detail, "hint": error.hint, "errors": findings}
        )
    except KeyboardInterrupt:
        stderr().print(Text("interrupted", style="yellow"))
        return 130
    except BrokenPipeError:
        # The reader of a pipe has left; what is still in the buffer must not raise at exit.
        sys.stdout = None
    except OSError as error:
        # A full disk, a folder that may not be written: this machine's trouble, and no bug.
        print_problem({"code": "io_error", "detail": str(error)})
    else:
        return 0
    return 1


def main() -> None:
    """Entry point of the installed script."""
    sys.exit(run())
