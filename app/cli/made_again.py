"""How the command line shows the call that makes an adapter or a base model again."""

from __future__ import annotations

from typing import Any

from app.cli.output import fields, print_json, stdout


def show_recipe(title: str, found: dict[str, Any], *, as_json: bool) -> None:
    """Print what `GET …/recipe` answered."""
    if as_json:
        print_json(found)
        return
    call = found["call"] or {}
    shown = {
        "origin": found.get("origin"),
        "post to": call.get("path"),
        "body": call.get("body"),
        "versions": [f"{library} {number}" for library, number in found["versions"].items()],
        "same bytes": found["reproducible"],
        "because": found["because"],
    }
    stdout().print(fields(title, shown))
