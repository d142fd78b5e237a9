"""A transfer's report as tables: the verdict, and every arm with its interval."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from app.cli.engine_report import print_engine
from app.cli.output import fields, table


def print_transfer_report(console: Console, report: dict[str, Any]) -> None:
    gate, inputs, labels = report.get("gate") or {}, report.get("inputs") or {}, report.get("labels") or {}
    weights, training = report.get("weights") or {}, report.get("training") or {}
    lead = f"{gate['lead']:+.3f} [{gate['low']:+.3f}, {gate['high']:+.3f}]" if gate else None
    console.print(
        fields(
            f"transfer report: {report.get('method')}",
            {
                "verdict": report.get("verdict"),
                "reason": gate.get("reason") or "there was nothing to measure with",
                "lead (95 %)": lead,
                "negative flips": gate.get("negative_flips"),
                "only fidelity": report.get("fidelity_only") or None,
                "degraded": report.get("degraded") or None,
                "candidates": inputs.get("candidates"),
                "acceptance": _rate(inputs.get("acceptance")),
                "inputs kept": inputs.get("kept"),
                "answers kept": labels.get("kept"),
                "discriminator's AUC": report.get("discriminator_auc"),
                "steps": training.get("steps"),
                "loss of the last step": training.get("final_loss"),
                "modules moved": weights.get("moved_modules"),
                "modules left out": weights.get("left_out_modules"),
            },
        )
    )
    print_engine(console, report)
    arms = (report.get("evaluation") or {}).get("arms") or {}
    if arms:
        rows = [(name, _rate(arm.get("score")) or arm.get("reason"), arm.get("items")) for name, arm in arms.items()]
        console.print(table("right answers (95 %)", ("arm", "score", "#items"), rows))


def _rate(found: dict[str, float] | None) -> str | None:
    return None if found is None else f"{found['rate']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
