"""A search of merges as a job: every trial is told, the best is published, and no interruption changes anything."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from artifacts.base_model import inspect_base
from artifacts.errors import RequestInvalid
from artifacts.free_memory import free_memory
from storage import adapters
from train.measurement import Measurement
from workers.jobs import merge_search
from workers.kinds import KINDS

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
ROWS = [{"prompt": f"{a} plus {b} is ", "completion": str(a + b)} for a in range(3) for b in range(4)]
OTHER_ROWS = [{"prompt": f"{a} times {b} is ", "completion": str(a * b)} for a in range(2) for b in range(4)]
SECONDS = 200
PARAMETERS = {
    "methods": [
        {"method": "svd"},
        {
            "method": "core_space",
            "parameters": {"density": {"low": 0.2, "high": 1.0}, "rule": {"choices": ["ties", "sum"]}},
        },
    ],
    "weights": [{"low": -1.0, "high": 1.5}],
    "ranks": [1, 4],
    "trials": 9,
    "startup_trials": 4,
    "seed": 5,
}


@pytest.fixture
def search(train_pool: Any, add_adapter: Any, add_dataset: Any, base_id: str, tiny_base: Any) -> Any:
    """The parameters of a search, with changes."""
    sides = {"d_in": 32, "d_out": 32, "modules": MODULES, "base_model": inspect_base(tiny_base).name}
    ids = [add_adapter("a", 1, **sides), add_adapter("b", 2, **sides)]
    datasets = [add_dataset(ROWS), add_dataset(OTHER_ROWS, "products")]

    def params(**changes: Any) -> dict[str, Any]:
        return {
            "adapters": [{"id": key, "weight": 0.5} for key in ids],
            "method": "search",
            "parameters": {**PARAMETERS, **changes.pop("parameters", {})},
            "evaluation": {"datasets": datasets, "base_model": base_id, "metric": "loss", "max_rows": 6},
            **changes,
        }

    return params


def steady(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**trial, "seconds": 0} for trial in report["trials"]]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_best_trial_is_published_with_all_of_them_in_its_lineage(
    train_pool: Any, search: Any, tiny_base: Any
) -> None:
    pool = train_pool
    job_id = pool.submit("merge", **search(name="found"))
    pool.start(kinds=KINDS, model_roots=(str(tiny_base.parent),))
    job = pool.ended(job_id, seconds=SECONDS)
    assert job.error is None
    report = job.result["report"]
    trials = report["trials"]
    assert [trial["number"] for trial in trials] == list(range(9))
    assert report["ended_by"] == "trials"
    # first both methods as they were asked for
    assert [(trial["label"], trial["weights"]) for trial in trials[:2]] == [
        ("svd", [0.5, 0.5]),
        ("core_space", [0.5, 0.5]),
    ]
    assert trials[1]["parameters"] == {"density": 0.2, "rule": "ties", "rank": 1}
    values = {trial["number"]: trial["value"] for trial in trials if trial["state"] == "measured"}
    assert report["ranking"] == sorted(values, key=lambda number: values[number])
    best = trials[report["best"]]
    assert report["best"] == report["ranking"][0]
    means = [math.fsum(part["figures"]["loss"] for part in trial["datasets"]) / 2 for trial in trials]
    assert [trial["figures"]["loss"] for trial in trials] == pytest.approx(means)
    assert report["merge"]["method"] == best["method"]
    assert [item["weight"] for item in report["merge"]["adapters"]] == best["weights"]
    assert [item["rows"] for item in report["evaluation"]["datasets"]] == [6, 6]
    with pool.database.read() as session:
        edges = adapters.lineage(session, job.result["adapters"][0]).edges
    first, second = (edge.recipe for edge in edges)
    assert [trial["value"] for trial in first["search"]["trials"]] == [trial["value"] for trial in trials]
    assert "search" not in second
    assert first["method"] == best["method"]
    # the recipe alone gives the same bytes, and so the same adapter
    again = pool.submit(
        "merge",
        adapters=[{"id": item["id"], "weight": item["weight"]} for item in first["adapters"]],
        method=first["method"],
        parameters=first["parameters"],
    )
    assert pool.ended(again, seconds=SECONDS).result["adapters"] == job.result["adapters"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_that_was_killed_finds_the_same(train_pool: Any, search: Any, tiny_base: Any) -> None:
    pool = train_pool
    whole = pool.submit("merge", **search())
    killed = pool.submit("dies_after", **search(name="5"))
    kinds = {**KINDS, "dies_after": "search_kinds:dies_after"}
    pool.start(kinds=kinds, model_roots=(str(tiny_base.parent),))
    first, second = (pool.ended(job_id, seconds=SECONDS) for job_id in (whole, killed))
    assert (first.attempt, second.attempt, first.error, second.error) == (1, 2, None, None)
    assert second.result["report"]["tried"] == [5, 6, 7, 8]
    assert steady(first.result["report"]) == steady(second.result["report"])
    assert first.result["adapters"] == second.result["adapters"]  # stored by their bytes


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_ends_when_its_time_is_spent_or_nothing_is_left(train_pool: Any, search: Any, tiny_base: Any) -> None:
    pool = train_pool
    late = pool.submit("merge", **search(parameters={"seconds": 1e-6}))
    few = {"methods": [{"method": "svd"}], "weights": None, "ranks": [1, 2, 3], "trials": 50}
    exhausted = pool.submit("merge", **search(parameters=few))
    pool.start(kinds=KINDS, model_roots=(str(tiny_base.parent),))
    report = pool.ended(late, seconds=SECONDS).result["report"]
    assert (report["ended_by"], len(report["trials"])) == ("seconds", 1)
    report = pool.ended(exhausted, seconds=SECONDS).result["report"]
    assert report["ended_by"] == "exhausted"
    measured = [trial for trial in report["trials"] if trial["state"] == "measured"]
    assert sorted(trial["parameters"]["rank"] for trial in measured) == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_merges_that_can_not_be_done_are_failed_trials_and_a_search_of_nothing_else_fails(
    train_pool: Any, search: Any, tiny_base: Any
) -> None:
    pool = train_pool
    # DELLA needs density ± epsilon between 0 and 1
    density = {"density": {"choices": [0.9, 0.5]}}
    parameters = {"methods": [{"method": "della", "parameters": density}]}
    job_id = pool.submit("merge", **search(parameters={**parameters, "weights": None, "ranks": None, "trials": 4}))
    density = {"density": {"choices": [0.9, 0.95]}}
    none = {"methods": [{"method": "della", "parameters": density}], "weights": None, "ranks": None}
    nothing = pool.submit("merge", **search(parameters=none))
    pool.start(kinds=KINDS, model_roots=(str(tiny_base.parent),))
    job = pool.ended(job_id, seconds=SECONDS)
    assert job.error is None
    states = {trial["parameters"]["density"]: trial["state"] for trial in job.result["report"]["trials"]}
    assert states == {0.9: "failed", 0.5: "measured"}
    failed = next(trial for trial in job.result["report"]["trials"] if trial["state"] == "failed")
    assert "density" in failed["problem"]
    error = pool.ended(nothing, seconds=SECONDS).error
    assert error["code"] == "invalid_request"
    assert "None of the" in error["detail"]


def test_a_merge_that_overflows_and_figures_that_are_not_finite_are_failed_trials(
    tiny_base: Any, run_here: Any, search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, asked = Measurement.of, []

    def infinite_once(self: Measurement, directory: Path) -> dict[str, Any]:
        asked.append(directory)
        found = of(self, directory)
        if len(asked) == 1:
            # not what the trials are chosen by
            found["datasets"][1]["figures"]["perplexity"] = math.inf
        return found

    monkeypatch.setattr(Measurement, "of", infinite_once)
    order: list[str] = []
    monkeypatch.setattr(Measurement, "__init__", told(order, "base model", Measurement.__init__))
    monkeypatch.setattr(merge_search, "free_memory", told(order, "memory", free_memory))
    scales = {"scale": {"choices": [1e-6, 1e6, 5e-7]}, "output_dtype": "float16"}
    parameters = {
        "methods": [{"method": "svd", "parameters": scales}],
        "weights": None,
        "ranks": None,
        "trials": 6,
        "sampler": "random",
    }
    wanted = search(parameters=parameters)
    for item in wanted["adapters"]:
        item["weight"] = 1e6
    report = run_here("merge", model_roots=(str(tiny_base.parent),), **wanted)["report"]
    found = {trial["parameters"]["scale"]: trial for trial in report["trials"] if trial["state"] != "repeated"}
    assert {scale: trial["state"] for scale, trial in found.items()} == {
        1e-6: "failed",
        1e6: "failed",
        5e-7: "measured",
    }
    assert "the merged adapter gave numbers that are not finite: datasets.1.figures.perplexity is inf" in str(
        found[1e-6]["problem"]
    )
    assert "differs by" in found[1e6]["problem"]
    assert report["trials"][report["best"]]["parameters"]["scale"] == 5e-7
    assert order == ["base model", "memory"]  # what is left for the shelf is known only then


def test_a_base_model_without_finite_figures_is_told_at_once(
    tiny_base: Any, run_here: Any, search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Measurement, "base", property(lambda _: {"loss": 800.0, "perplexity": math.inf}))
    monkeypatch.setattr(Measurement, "of", lambda *_: pytest.fail("a merge was measured"))
    with pytest.raises(RequestInvalid, match=r"the base model alone gave .*: figures.perplexity is inf"):
        run_here("merge", model_roots=(str(tiny_base.parent),), **search())


def test_a_trial_that_the_engine_would_not_load_has_failed(
    tiny_base: Any, run_here: Any, search: Any, add_adapter: Any
) -> None:
    sides = {"d_in": 32, "d_out": 32, "modules": MODULES, "base_model": inspect_base(tiny_base).name, "rank": 257}
    methods = [{"method": "linear"}, {"method": "svd", "parameters": {"rank": 4}}]
    parameters = {"methods": methods, "weights": None, "ranks": None}
    wanted = search(parameters=parameters, target_engine="vllm")
    wanted["adapters"] = [{"id": add_adapter(name, seed, **sides)} for seed, name in enumerate("cd")]
    report = run_here("merge", model_roots=(str(tiny_base.parent),), **wanted)["report"]
    assert [trial["state"] for trial in report["trials"]] == ["failed", "measured"]
    assert "vllm would not load the result" in report["trials"][0]["problem"]
    assert report["merge"]["target_engine"]["loads"]


def told(order: list[str], name: str, function: Any) -> Any:
    """The function, which tells when it is called."""

    def called(*args: Any, **options: Any) -> Any:
        order.append(name)
        return function(*args, **options)

    return called
