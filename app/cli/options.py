"""Options and arguments that several commands share, and the parsing of `key=value` texts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.output import remember_json

Json = Annotated[
    bool,
    typer.Option("--json", help="Print the API's JSON and nothing else.", callback=remember_json),
]
Limit = Annotated[int, typer.Option("--limit", min=1, max=200, help="How many to show.")]
Cursor = Annotated[str | None, typer.Option("--cursor", help="Go on where the last page ended (its `next`).")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's id (job_…).")]
TargetEngine = Annotated[
    str | None,
    typer.Option(
        "--target-engine",
        metavar="ENGINE",
        help="What shall load the adapter: vllm, diffusers, peft, transformers, kohya, comfy or llama.cpp.",
    ),
]
AdapterId = Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's id (adp_…).")]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Where the embedded database and files live (RANKWISE_DATA_DIR)."),
]


def stem(path: Path) -> str:
    """A path's name without the suffix that says how it is packed; other dots belong to the name."""
    name = path.resolve().name
    for suffix in (".tar.gz", ".tgz", ".tar", ".zip", ".safetensors"):
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


def plain_name(label: str) -> str:
    """A label as a part of a file name."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in label)


def split_pairs(texts: Iterable[str], option: str) -> list[tuple[str, str]]:
    """`["a=1", "b=x=y"]` → `[("a", "1"), ("b", "x=y")]`.

    Raises:
        typer.BadParameter: a text without a name or without `=`.
    """
    pairs = []
    for text in texts:
        name, separator, value = text.rpartition("=") if option == "--weight" else text.partition("=")
        if not separator or not name.strip():
            raise typer.BadParameter(f"{text!r} is not of the form NAME=VALUE", param_hint=option)
        pairs.append((name.strip(), value.strip()))
    return pairs


_BARE_POINT = re.compile(r"[+-]?(\d+\.|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def parse_settings(texts: Iterable[str]) -> dict[str, Any]:
    """`--set` texts as parameters: a value that reads as JSON is that value, any other is a string.

    Numbers that people write and JSON does not know, `.5` and `5.`, are numbers too.
    """
    parameters: dict[str, Any] = {}
    for name, value in split_pairs(texts, "--set"):
        try:
            parameters[name] = json.loads(value)
        except ValueError:
            parameters[name] = float(value) if _BARE_POINT.fullmatch(value) else value
    return parameters


def parse_weights(texts: Iterable[str]) -> dict[str, float]:
    """`--weight` texts as name → number; the name may itself hold `=`, the number may not.

    Raises:
        typer.BadParameter: a value that is not a finite number, or one name twice.
    """
    weights: dict[str, float] = {}
    for name, value in split_pairs(texts, "--weight"):
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise typer.BadParameter(f"the weight of {name!r} is {value!r}, not a number", param_hint="--weight")
        if name in weights:
            raise typer.BadParameter(f"{name!r} has two weights", param_hint="--weight")
        weights[name] = weight
    return weights
