"""The report of a transfer as a page: plots in it, no script, nothing fetched, every text escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from artifacts.svg import document, text, ticks
from train.loss_curve import draw

MEDIA_TYPE = "text/html"
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
}
WIDTH, LEFT, RIGHT, ROW = 720, 190, 60, 28
_PLOT_STYLE = (
    ".grid{stroke:#eee}.axis{stroke:#bbb}.span{stroke:#1f4fa8;stroke-width:3}.dot{fill:#1f4fa8}"
    ".bad{fill:#f7dcdc}.good{fill:#dcf0dc}.border{stroke:#b00;stroke-dasharray:4 3}.bar{fill:#9db7e8}"
)
_PAGE_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:760px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{border-bottom:1px solid #ddd;padding:.2em .8em .2em 0;text-align:left}"
    ".pass{color:#176117}.fail{color:#a11}.hold{color:#8a5a00}svg{max-width:100%;height:auto}"
)


def page(
    transfer: Mapping[str, Any], report: Mapping[str, Any], losses: Sequence[tuple[int, Mapping[str, float]]]
) -> str:
    """A whole HTML document.

    Args:
        transfer, report: as `GET /transfers/{id}/report` has them.
        losses: (step, numbers) of the training; empty where nothing was trained.
    """
    verdict = str(report.get("verdict"))
    title = f"{transfer['adapter_name']}: {transfer['method']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p>Verdict of the gate: <strong class="{escape(verdict)}">{escape(verdict)}</strong>{_decided(transfer)}</p>',
        _table(_facts(transfer, report)),
        *_scores(report),
        *_gate(report),
        *_inputs(report),
    ]
    if losses:
        parts += ["<h2>Training</h2>", draw(losses, "the new adapter")]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_PAGE_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _decided(transfer: Mapping[str, Any]) -> str:
    decision = transfer.get("decision")
    if decision is None:
        return "; the adapter waits for a decision" if transfer.get("waiting") else ""
    why = f": {decision['reason']}" if decision.get("reason") else ""
    return escape(f"; decided to {decision['decision']} on {decision['at']}{why}")


def _facts(transfer: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    bases = report.get("bases") or {}
    yield "source adapter", f"{transfer['adapter_name']} ({transfer['adapter']})"
    yield "source base", (bases.get("source") or {}).get("name")
    yield "target base", (bases.get("target") or {}).get("name")
    yield "new adapter", transfer.get("new_adapter")
    yield (
        "degraded",
        "yes: too few inputs were accepted, the best of the others were taken" if transfer.get("degraded") else None,
    )
    yield (
        "measured with",
        "held-out synthetic inputs: only fidelity to the source adapter" if report.get("fidelity_only") else None,
    )
    yield "discriminator's AUC", report.get("discriminator_auc")
    data = report.get("data") or {}
    yield "rows trained on", data.get("rows")
    labels = report.get("labels") or {}
    yield "answers that ended", _percent(labels.get("end_rate"))
    yield "different answers", labels.get("distinct")
    weights = report.get("weights") or {}
    yield "modules moved", weights.get("moved_modules")
    yield "modules left out", weights.get("left_out_modules")


def _scores(report: Mapping[str, Any]) -> Iterator[str]:
    arms: Mapping[str, Any] = (report.get("evaluation") or {}).get("arms") or {}
    measured = [(name, arm["score"]) for name, arm in arms.items() if "score" in arm]
    if not measured:
        yield "<h2>Scores</h2><p>There was nothing to measure with.</p>"
        return
    items = next(arm["items"] for arm in arms.values() if "items" in arm)
    yield f"<h2>Scores</h2><p>Share of {items} items that were answered rightly, with the 95 % interval.</p>"
    yield _intervals([(name, score["rate"], score["low"], score["high"]) for name, score in measured], "scores")
    refused = [(name, arm["reason"]) for name, arm in arms.items() if not arm.get("applicable", True)]
    if refused:
        yield "<p>Controls that could not be made:</p>" + _table(refused)


def _gate(report: Mapping[str, Any]) -> Iterator[str]:
    gate = report.get("gate")
    if gate is None:
        return
    yield f"<h2>Gate</h2><p>{escape(gate['reason'])} Negative flips: {int(gate['negative_flips'])}.</p>"
    height = 74
    border, low, high = -gate["epsilon"], gate["low"], gate["high"]
    at, end = _x(border, -1, 1), _x(1, -1, 1)
    parts = [
        f'<rect class="bad" x="{LEFT}" y="10" width="{at - LEFT:.1f}" height="32"/>',
        f'<rect class="good" x="{at:.1f}" y="10" width="{end - at:.1f}" height="32"/>',
        text(LEFT - 10, 30, "lead", "end"),
        *_span(gate["lead"], low, high, 26, -1),
        f'<line class="border" x1="{at:.1f}" x2="{at:.1f}" y1="10" y2="42"/>',
        *_axis(-1, height - 14),
    ]
    yield document(WIDTH, height, "lead over the better of source and untouched target", _PLOT_STYLE, parts)
    yield f"<p>Green: the lead is at or above −ε ({border:g}); an interval that reaches over it does not decide.</p>"


def _inputs(report: Mapping[str, Any]) -> Iterator[str]:
    found: Mapping[str, Any] = report.get("inputs") or {}
    rates = [
        (name.replace("_", " "), found[name]["rate"], found[name]["low"], found[name]["high"])
        for name in ("acceptance", "acceptance_at_zero")
        if found.get(name)
    ]
    if not found:
        return
    yield "<h2>Inputs</h2>"
    if rates:
        yield _intervals(rates, "acceptance")
    counts = [(name, value) for name, value in found.items() if isinstance(value, int | float | str)]
    yield _table([*counts, *((f"screening: {name}", value) for name, value in (found.get("screening") or {}).items())])
    leaks: Mapping[str, Any] = report.get("leaks") or {}
    if leaks:
        yield "<p>What of seeds and patterns was found in the rows, counted:</p>" + _table(leaks.items())


def _intervals(rows: Sequence[tuple[str, float, float, float]], title: str) -> str:
    height = ROW * len(rows) + 40
    parts = list(_axis(0, height - 12))
    for place, (name, rate, low, high) in enumerate(rows):
        y = 16 + ROW * place
        parts += [text(LEFT - 10, y + 4, name[:30], "end"), *_span(rate, low, high, y, 0)]
        parts.append(text(WIDTH - RIGHT + 8, y + 4, f"{rate:.1%}"))
    return document(WIDTH, height, title, _PLOT_STYLE, parts)


def _span(middle: float, low: float, high: float, y: float, least: float) -> list[str]:
    return [
        f'<line class="span" x1="{_x(low, least, 1):.1f}" x2="{_x(high, least, 1):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>',
        f'<circle class="dot" cx="{_x(middle, least, 1):.1f}" cy="{y:.1f}" r="5"/>',
    ]


def _axis(least: float, y: float) -> Iterator[str]:
    for tick in ticks(least, 1):
        if least <= tick <= 1:
            x = _x(tick, least, 1)
            yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{y - 12:.1f}"/>'
            yield text(x, y, f"{tick:g}", "middle")


def _x(value: float, least: float, most: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (value - least) / (most - least)


def _table(rows: Any) -> str:
    cells = (
        f"<tr><th>{escape(str(name))}</th><td>{escape(_shown(value))}</td></tr>"
        for name, value in rows
        if value is not None
    )
    return f"<table>{''.join(cells)}</table>"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"
