"""`rankwise methods`: the menu of the service."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from app.cli.options import Json
from app.cli.output import fields, print_json, stdout, table


def methods(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="One method, with all its parameters.")] = None,
    kind: Annotated[str, typer.Option("--kind", help="Kind of the method.")] = "merge",
    as_json: Json = False,
) -> None:
    """List the methods of the service, or show one with its parameters, defaults and ranges."""
    with context.obj() as client:
        found = client.get(f"/methods/{kind}/{name}" if name else "/methods")
    if as_json:
        print_json(found)
    elif name:
        _show(found)
    else:
        rows = [(item["kind"], item["name"], item["title"], item["summary"]) for item in found["items"]]
        stdout().print(table(None, ("kind", "name", "title", "what it does"), rows))


def _show(method: dict[str, Any]) -> None:
    stdout().print(
        fields(
            method["title"],
            {
                "name": method["name"],
                "what it does": method["summary"],
                **{label: method[label] for label in ("when", "cost", "output") if method.get(label)},
                "arXiv": method.get("arxiv"),
                "reference": method.get("reference_url"),
                **{str(key).replace("_", " "): value for key, value in (method.get("capabilities") or {}).items()},
            },
        )
    )
    rows = [
        (parameter, _type(field), field.get("default"), field.get("description"))
        for parameter, field in method["parameters_schema"].get("properties", {}).items()
    ]
    stdout().print(table("parameters", ("name", "values", "default", "meaning"), rows))


def _type(field: dict[str, Any]) -> str:
    """The values that a JSON-Schema field takes, as short text."""
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"])
    if "enum" in field:
        return " | ".join(str(value) for value in field["enum"])
    if "const" in field:
        return str(field["const"])
    low = field.get("minimum", field.get("exclusiveMinimum"))
    high = field.get("maximum", field.get("exclusiveMaximum"))
    bounds = f" {'–' if low is None else low}…{'–' if high is None else high}" if (low, high) != (None, None) else ""
    return f"{field.get('type', 'any')}{bounds}"
