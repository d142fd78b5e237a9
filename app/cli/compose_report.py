"""A composition's report as tables: what was done, what it cost, and where the concepts were."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from app.cli.output import duration, fields, table


def print_compose_report(console: Console, report: dict[str, Any]) -> None:
    """Of one image, or of several that are compared."""
    variants = report.get("variants")
    if variants is None:
        _print_image(console, report)
        return
    rows = [
        (item["label"], item["method"], _passes(item["report"]), _seconds(item["report"]), _warnings(item["report"]))
        for item in variants
    ]
    console.print(table("comparison", ("image", "method", "#passes", "#seconds", "warnings"), rows))


def _print_image(console: Console, report: dict[str, Any]) -> None:
    updates = report.get("updates") or []
    console.print(
        fields(
            f"composition report: {report.get('method')}",
            {
                "prompt": report.get("prompt"),
                "size": f"{report['width']}×{report['height']}" if "width" in report else None,
                "rank": report.get("rank"),
                "layers": report.get("layers"),
                "seed": report.get("seed"),
                "steps": report.get("steps"),
                "sampler": report.get("scheduler"),
                "sample passes of the UNet": _passes(report),
                "took": duration(_seconds(report)),
                "updates of the latent": len(updates) or None,
                "first update moved it by": f"{updates[0]['moved']:.1%}" if updates else None,
                "loss": f"{updates[0]['before']:.4g} → {updates[-1]['before']:.4g}" if updates else None,
                "warnings": _warnings(report),
            },
        )
    )
    covered = report.get("coverage") or []
    if covered:
        names = [name for name in covered[0] if name != "step"]
        rows = [(item["step"], *(f"{item[name]:.0%}" for name in names)) for item in covered]
        console.print(table("share of the image", ("#step", *(f"#{name}" for name in names)), rows))


def _passes(report: dict[str, Any]) -> int | None:
    found: int | None = (report.get("passes") or {}).get("unet_samples")
    return found


def _seconds(report: dict[str, Any]) -> float:
    return float((report.get("seconds") or {}).get("total") or 0.0)


def _warnings(report: dict[str, Any]) -> str | None:
    return "\n".join(report.get("warnings") or ()) or None
