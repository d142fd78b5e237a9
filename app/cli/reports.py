"""Reports of merges as tables: the whole, interference, the modules that lost most, warnings."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from app.cli.engine_report import print_engine
from app.cli.output import fields, table

WORST_MODULES = 5


def print_report(console: Console, report: dict[str, Any]) -> None:
    """The whole first, then how the adapters interfere, the modules furthest from the exact sum, and each warning.

    Of a search first its trials.
    """
    if "trials" in report:
        _print_trials(console, report)
        print_report(console, report["merge"])
        return
    total = report.get("total") or {}
    clusters = total.get("clusters") or {}
    reload_check = report.get("reload_check") or {}
    console.print(
        fields(
            f"merge report: {report.get('method')}",
            {
                "rank": report.get("rank"),
                "modules": _modules(report, total),
                "energy kept": _percent(total.get("energy_kept")),
                "relative error": _percent(total.get("relative_error")),
                "cosine in clusters": clusters.get("mean_cosine"),
                "agreement of seeds": clusters.get("mean_agreement"),
                "largest reweighting": clusters.get("largest_factor"),
                "capped clusters": clusters.get("capped"),
                "base model proof": report.get("compatibility"),
                "dtype": report.get("dtype"),
                "rounding error": report.get("rounding_error"),
                "read back": _reload(reload_check),
                "seconds": report.get("seconds"),
            },
        )
    )
    _print_interference(console, report.get("adapters") or [], total.get("interference") or [])
    _print_worst(console, report.get("modules") or [])
    print_engine(console, report)
    for warning in report.get("warnings") or ():
        console.print(Text.assemble(("warning  ", "bold yellow"), str(warning)))


def print_comparison(console: Console, report: dict[str, Any]) -> None:
    """A row for each candidate, the best one first and those that could not be measured last; then how the adapters
    interfere, and each warning."""
    rows = {row["label"]: row for row in report["candidates"]}
    unranked = [row for label, row in rows.items() if label not in report["ranking"]]
    shown = [*(rows[label] for label in report["ranking"]), *unranked]
    metric = [f"#{report['ranked_by']}"] if report.get("evaluation") else []
    console.print(
        table(
            f"ranked by {report['ranked_by']}",
            ("candidate", "method", "#rank", "#energy kept", "#relative error", *metric, "#seconds", "warnings"),
            [
                (
                    row["label"],
                    row["method"],
                    row["rank"],
                    _percent(row["energy_kept"]),
                    _percent(row["relative_error"]),
                    *(
                        row["figures"][name.removeprefix("#")] if "figures" in row else row["problem"]
                        for name in metric
                    ),
                    row["seconds"],
                    len(row["warnings"]),
                )
                for row in shown
            ],
        )
    )
    _print_interference(console, report["adapters"], report["interference"])
    for row in shown:
        for warning in row["warnings"]:
            console.print(Text.assemble((f"{row['label']}  ", "bold yellow"), str(warning)))


def _print_trials(console: Console, report: dict[str, Any]) -> None:
    """A row for each trial that was measured, the best one first, then those that failed."""
    trials = report["trials"]
    order = [*report["ranking"], *(item["number"] for item in trials if item["state"] == "failed")]
    adapters = report["merge"]["adapters"]
    names = [str(item.get("name") or item["id"]) for item in adapters]
    metric = report["metric"]
    console.print(
        table(
            f"{len(trials)} trials, ended by {report['ended_by']}",
            ("#trial", "merge", "parameters", *(f"#{name}" for name in names), "#rank", f"#{metric}", "#seconds"),
            [
                (
                    item["number"],
                    item["label"],
                    ", ".join(f"{key}={value}" for key, value in item["parameters"].items()),
                    *(f"{weight:.3f}" for weight in item["weights"]),
                    item["rank"],
                    item.get("figures", {}).get(metric) if item["problem"] is None else item["problem"],
                    item["seconds"],
                )
                for item in (trials[number] for number in order)
            ],
        )
    )
    console.print(f"the base model alone: {metric} {report['evaluation']['base'][metric]:.4g}")


def _print_interference(console: Console, adapters: list[dict[str, Any]], cosines: list[list[float | None]]) -> None:
    names = [str(item.get("name") or item.get("id")) for item in adapters]
    if len(names) > 1 and len(cosines) == len(names):
        rows = [[name, *(_signed(value) for value in row)] for name, row in zip(names, cosines, strict=True)]
        console.print(table("interference: cosines of the deltas", ("", *(f"#{name}" for name in names)), rows))


def _print_worst(console: Console, modules: list[dict[str, Any]]) -> None:
    lossy = [module for module in modules if (module.get("relative_error") or 0.0) > 0.0]
    worst = sorted(lossy, key=lambda module: float(module["relative_error"]), reverse=True)[:WORST_MODULES]
    if not worst:
        return
    rows = [
        (
            module["path"],
            module.get("rank"),
            _percent(module.get("energy_kept")),
            _percent(module.get("relative_error")),
            (module.get("clusters") or {}).get("mean_cosine"),
        )
        for module in worst
    ]
    columns = ("module", "#rank", "#energy kept", "#relative error", "#cosine in clusters")
    console.print(table(f"furthest from the exact sum, {len(worst)} of {len(modules)} modules", columns, rows))


def _modules(report: dict[str, Any], total: dict[str, Any]) -> str:
    parts = [str(total.get("modules", len(report.get("modules") or ())))]
    if total.get("padded_modules"):
        parts.append(f"{total['padded_modules']} padded")
    if report.get("dropped_modules"):
        parts.append(f"{len(report['dropped_modules'])} dropped")
    return ", ".join(parts)


def _reload(check: dict[str, Any]) -> str | None:
    if not check:
        return None
    return f"{'equal' if check.get('passed') else 'differs'}, relative error {check.get('largest_relative_error'):.1e}"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.2%}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"
