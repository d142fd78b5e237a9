"""`rankwise config`: what the service would run with, and where each value comes from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from pydantic import SecretStr

from app.cli.options import DataDir, Json
from app.cli.output import print_json, stdout, table
from artifacts.errors import FieldError, RequestInvalid

if TYPE_CHECKING:
    from app.settings import Settings

app = typer.Typer(help="Settings: what the service runs with, and where each value comes from.", no_args_is_help=True)
DERIVED = ("database_url", "blob_url")


def load_settings(**overrides: Any) -> Settings:
    """The settings of this environment; an override that is None counts as not given.

    Raises:
        RequestInvalid: a value that can not be used, with the name of its environment variable.
    """
    from pydantic import ValidationError

    from app.settings import Settings

    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        findings = [
            FieldError(
                f"RANKWISE_{str(item['loc'][0]).upper()}" if item["loc"] else "settings",
                item["msg"].removeprefix("Value error, "),
            )
            for item in error.errors(include_url=False, include_input=False)
        ]
        raise RequestInvalid("The settings are not valid.", errors=findings) from error


def sources(settings: Settings, overrides: dict[str, Any]) -> list[dict[str, Any]]:
    """Every setting as {name, variable, value, source}, secrets masked."""
    from app.logs import redact

    prefix = settings.model_config.get("env_prefix", "")
    environment = {name.upper(): value for name, value in os.environ.items()}
    rows = []
    for name in type(settings).model_fields:
        variable = f"{prefix}{name}".upper()
        if overrides.get(name) is not None:
            source = "command line"
        elif environment.get(variable):
            source = "environment"
        elif name in DERIVED:
            source = "derived from data_dir"
        else:
            source = "default"
        rows.append(
            {"name": name, "variable": variable, "value": redact(_plain(getattr(settings, name))), "source": source}
        )
    return rows


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, SecretStr) else value


@app.command("show")
def show(data_dir: DataDir = None, as_json: Json = False) -> None:
    """Print every setting, its value and its source; passwords in addresses are masked."""
    overrides = {"data_dir": data_dir}
    rows = sources(load_settings(**overrides), overrides)
    if as_json:
        print_json(rows)
    else:
        cells = [(row["variable"], row["value"], row["source"]) for row in rows]
        stdout().print(table(None, ("variable", "value", "source"), cells))
