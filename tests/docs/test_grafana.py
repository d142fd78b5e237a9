"""The dashboard and the alert rules ask for nothing that the service does not export."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from app.metrics import Metrics
from storage.figures import Figures, StoredFigures

FOLDER = Path("docs") / "grafana"
# Prometheus adds these to every series; `up` is its own.
ADDED_LABELS = {"job", "instance"}
OWN_METRICS = {"up": set[str]()}
SELECTOR = re.compile(r"(?<![\w$.])(?P<name>rankwise_\w+|up)(?P<matchers>\{[^}]*\})?(?![\w(])")
FUNCTIONS = {"sum", "min", "max", "rate", "increase", "histogram_quantile", "vector", "and", "or", "by"}


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Every series of a registry in which everything has happened once: name → labels."""
    metrics = Metrics()
    metrics.requests.labels("GET", "/", "200").inc()
    metrics.request_seconds.labels("GET", "/").observe(0.1)
    metrics.uploads.labels("created").inc()
    metrics.jobs_submitted.labels("merge").inc()
    metrics.pool.claimed("merge", 1.0)
    metrics.pool.claim_took(1.0)
    metrics.pool.ended("merge", "succeeded", 1.0)
    metrics.pool.retried("merge", "worker_crashed")
    slots, busy = {("cpu", "idle"): 1}, {("srv_1", "cpu"): 1.0}
    metrics.observe_service(
        lambda: Figures(slots=slots, busy_seconds=busy), lambda: StoredFigures(0, 0, 0, {"pending": 0})
    )
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.fixture(scope="module")
def dashboard(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / FOLDER / "rankwise.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def rules(root: Path) -> list[dict[str, Any]]:
    document = yaml.safe_load((root / FOLDER / "alerts.yaml").read_text(encoding="utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def problems_of(expression: str, exported: dict[str, set[str]]) -> Iterator[str]:
    """What is wrong with a PromQL expression, as far as names go."""
    if any(expression.count(left) != expression.count(right) for left, right in ("()", "[]", "{}")):
        yield "its brackets are not balanced"
    selectors = list(SELECTOR.finditer(expression))
    if not selectors:
        yield "it asks for nothing"
    labels: set[str] = set(ADDED_LABELS)
    for found in selectors:
        known = {**exported, **OWN_METRICS}.get(found["name"])
        if known is None:
            yield f"there is no metric {found['name']}"
            continue
        labels |= known
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", found["matchers"] or ""):
            if label not in known | ADDED_LABELS:
                yield f"{found['name']} has no label {label}"
    for grouped in re.findall(r"\bby\s*\(([^)]*)\)", expression):
        for label in (item.strip() for item in grouped.split(",")):
            if label not in labels:
                yield f"nothing in it has the label {label}"
    without = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]', "", SELECTOR.sub("", expression))
    for function in re.findall(r"\b([a-z_]+)\s*\(", without):
        if function not in FUNCTIONS:
            yield f"{function} is not a function that we use"


def test_every_panel_asks_for_what_is_exported(dashboard: dict[str, Any], exported: dict[str, set[str]]) -> None:
    asked = expressions(dashboard)
    assert len(asked) > 20
    assert not [(expression, problem) for expression in asked for problem in problems_of(expression, exported)]


def test_every_rule_asks_for_what_is_exported(rules: list[dict[str, Any]], exported: dict[str, set[str]]) -> None:
    assert len(rules) > 5
    assert not [(rule["alert"], problem) for rule in rules for problem in problems_of(rule["expr"], exported)]
    for rule in rules:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("max(rankwise_nonsense)", "there is no metric rankwise_nonsense"),
        ('max(rankwise_jobs{colour="red"})', "rankwise_jobs has no label colour"),
        ("sum by (kind) (rankwise_jobs)", "nothing in it has the label kind"),
        ("sum(rankwise_jobs", "its brackets are not balanced"),
        ("sun(rankwise_jobs)", "sun is not a function that we use"),
        ("vector(1)", "it asks for nothing"),
    ],
)
def test_a_wrong_expression_is_found(expression: str, problem: str, exported: dict[str, set[str]]) -> None:
    assert problem in list(problems_of(expression, exported))


def test_every_exported_metric_is_looked_at_and_explained(
    root: Path, dashboard: dict[str, Any], exported: dict[str, set[str]], pages: dict[str, str]
) -> None:
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in exported}
    shown = {
        re.sub(r"_(bucket|count|sum)$", "", match["name"])
        for expression in expressions(dashboard)
        for match in SELECTOR.finditer(expression)
    }
    assert families == shown
    assert not [name for name in families if f"`{name}`" not in pages["how-to/metrics.md"]]


def test_every_alert_is_explained(rules: list[dict[str, Any]], pages: dict[str, str]) -> None:
    assert not [rule["alert"] for rule in rules if f"`{rule['alert']}`" not in pages["how-to/metrics.md"]]


def test_no_metric_is_explained_that_is_not_there(exported: dict[str, set[str]], pages: dict[str, str]) -> None:
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in exported} | set(exported)
    for name, text in pages.items():
        if name.startswith("how-to/"):
            assert set(re.findall(r"`(rankwise_[a-z_]+)`", text)) <= families, name


def test_the_dashboard_is_whole(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Service", "Queue", "Slots", "Jobs", "Failures", "Storage"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for target in panel.get("targets", ()):
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    names = {item["name"]: item for item in dashboard["templating"]["list"]}
    assert names["datasource"]["type"] == "datasource"
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) - {"__rate_interval"}
    assert used == set(names)


def test_no_two_panels_overlap(dashboard: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
