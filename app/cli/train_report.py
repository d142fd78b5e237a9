"""A training's report as tables: what was done, and what the model does before and after."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from app.cli.engine_report import print_engine
from app.cli.output import duration, fields, size, table


def print_train_report(console: Console, report: dict[str, Any]) -> None:
    data, memory, reload_check = report.get("data") or {}, report.get("peak_memory") or {}, report.get("reload") or {}
    console.print(
        fields(
            f"training report: {report.get('method')}",
            {
                "steps": report.get("steps"),
                "went on at step": report.get("resumed_at"),
                "loop": duration(report.get("seconds") or 0.0),
                "tokens per second": report.get("tokens_per_second"),
                "loss of the last step": report.get("final_loss"),
                "trained parameters": report.get("trainable_parameters"),
                "adapted layers": report.get("target_modules"),
                "rows": f"{data.get('training_rows')} trained on, {data.get('validation_rows')} held out",
                "rows dropped": (data.get("dropped_rows") or {}).get("count") or None,
                "rows cut": (data.get("cut_rows") or {}).get("count") or None,
                "peak memory": size(memory.get("device") or memory.get("resident")),
                "PEFT's reload": f"logits differ by {reload_check.get('largest_difference', 0.0):.1e}",
            },
        )
    )
    _print_evaluation(console, report.get("evaluation") or {})
    _print_controls(console, data.get("controls") or {})
    print_engine(console, report)
    for warning in report.get("warnings") or ():
        console.print(Text.assemble(("warning  ", "bold yellow"), str(warning)))
    kept = report.get("transferable")
    if kept:
        console.print(
            fields(
                "kept for transfers",
                {
                    "task": kept["task"],
                    "seeds": kept["seeds"],
                    "inputs": f"{kept['inputs']} of the data, {kept['invented']} invented",
                    "discriminator": f"AUC {kept['auc']:.3f} on {kept['held_out']} of either that were held out",
                    "dataset": "dropped" if report.get("dataset_dropped") else None,
                },
            )
        )


def _print_evaluation(console: Console, evaluation: dict[str, Any]) -> None:
    before, after = evaluation.get("before"), evaluation.get("after")
    if not before or not after:
        return
    differences = evaluation.get("difference") or {}
    rows = [
        (name.replace("_", " "), before[name], after.get(name), _interval(differences.get(name))) for name in before
    ]
    console.print(table("on the rows held out", ("", "#before", "#after", "#change (95 %)"), rows))


def _print_controls(console: Console, controls: dict[str, Any]) -> None:
    """What simpler models reach on the same rows."""
    if controls:
        rows = [(name.replace("_", " "), found["accuracy"], found["auroc"]) for name, found in controls.items()]
        console.print(table("logistic regression on", ("", "#accuracy", "#auroc"), rows))


def _interval(found: dict[str, float] | None) -> str | None:
    return None if found is None else f"{found['difference']:+.4g} [{found['low']:+.4g}, {found['high']:+.4g}]"
