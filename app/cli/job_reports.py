"""How the report of a job is printed: one row for each kind of job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from rich.console import Console

from app.cli.compose_report import print_compose_report
from app.cli.output import fields
from app.cli.reports import print_comparison, print_report
from app.cli.train_report import print_train_report
from app.cli.transfer_report import print_transfer_report

Report = dict[str, Any]


def conversion_fields(report: Report) -> Report:
    """What a conversion kept."""
    return {key: report.get(key) for key in ("from", "to", "rank", "exact", "relative_error")}


def import_fields(report: Report) -> Report:
    """What was fetched, and what became of its keys."""
    shown = {key: report[key] for key in ("format", "method", "modules", "used_keys", "ignored_keys", "warnings")}
    return shown | {"revision": report["source"].get("revision")}


def push_fields(report: Report) -> Report:
    """Where the files went, and which."""
    shown = dict(report.get("hub") or report["oci"])
    return shown | {"relative error": report["relative_error"], "files": [file["path"] for file in report["files"]]}


def quantised_fields(report: Report) -> Report:
    """How small a quantised model became, and what was lost."""
    shown = ("matrices", "bits_per_weight", "packed_bytes", "dense_bytes", "relative_error")
    alone = {"without low-rank part": report["relative_error_of_quantising_alone"]}
    return {key: report[key] for key in shown} | alone


def load_check_fields(report: Report) -> Report:
    """What an engine's library made of an adapter."""
    base = report["base_model"]
    built = "layers of the adapter's own sizes" if base["built_from"] == "skeleton" else base["class"]
    shown: Report = {"loaded into": f"{base['name']} ({built})" if base["name"] else built}
    if report["refusal"] is not None:
        shown["refused"] = f"{report['refusal']['type']}: {report['refusal']['message']}"
    else:
        modules, scaling = report["modules"], report["scaling"]
        shown["modules with their numbers"] = f"{modules['loaded']} of {modules['of_adapter']}"
        shown["not loaded"] = modules["not_loaded"] or None
        shown["left out of the file"] = report["unexpected"]["names"] or None
        shown["made up by the engine"] = report["missing"]["names"] or None
        shown["rank and scaling"] = (
            f"{scaling['compared'] - scaling['different']} of {scaling['compared']} as in the file"
        )
    return shown | {"it said": report["warnings"] or None}


def print_load_check(console: Console, report: Report) -> None:
    """The engine's verdict, and what it rests on."""
    console.print(fields(f"{report['engine']}: {report['verdict']}", load_check_fields(report)))


def _print(title: str, shown: Callable[[Report], Report], console: Console, report: Report) -> None:
    console.print(fields(title, shown(report)))


REPORTS: Mapping[str, Callable[[Console, Report], None]] = MappingProxyType(
    {
        "merge": print_report,
        "merge_compare": print_comparison,
        "compose": print_compose_report,
        "compare": print_compose_report,
        "train": print_train_report,
        "transfer": print_transfer_report,
        "load_check": print_load_check,
        "convert": partial(_print, "conversion report", conversion_fields),
        "import": partial(_print, "import report", import_fields),
        "push": partial(_print, "push report", push_fields),
        "quantize": partial(_print, "quantisation report", quantised_fields),
        "client_update": partial(_print, "update of a client", dict),
    }
)
