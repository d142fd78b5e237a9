"""POST /merge with method search: what is accepted, what is refused at once, and a real search with its recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from artifacts.base_model import BaseModelRef
from storage import models

METHODS = [{"method": "svd"}, {"method": "lego", "parameters": {"seed": 1}}]


@pytest.fixture
def dataset(server: Any) -> str:
    """Of a server that knows a base model."""
    with server.services.database.write() as session:
        models.add_model(session, BaseModelRef("acme/tiny-llm", "hub", "acme/tiny-llm"))
    rows = b'{"prompt": "a", "completion": "b"}\n'
    found: str = server.client.post("/datasets", files={"file": ("d.jsonl", rows)}).json()["id"]
    return found


def body(ids: list[str], dataset: str, **changes: Any) -> dict[str, Any]:
    parameters = {"methods": METHODS, "weights": [{"low": 0.1, "high": 2}], "ranks": [2, 4], "trials": 5}
    return {
        "adapters": [{"id": key} for key in ids],
        "method": "search",
        "parameters": {**parameters, **changes.pop("parameters", {})},
        "evaluation": {"dataset": dataset},
        **changes,
    }


def test_a_search_is_a_queued_merge_with_the_id_of_its_base_model(
    server: Any, two_adapters: list[str], dataset: str
) -> None:
    response = server.client.post("/merge", json=body(two_adapters, dataset))
    assert response.status_code == 202, response.text
    job = response.json()
    assert (job["kind"], job["state"]) == ("merge", "queued")
    assert job["params"]["evaluation"]["base_model"].startswith("mdl_")
    plain = server.client.post("/merge", json=body(two_adapters, dataset, parameters={"methods": METHODS[:1]}))
    assert plain.status_code == 202
    menu = server.client.get("/methods/merge/search").json()
    assert menu["parameters_schema"]["properties"]["trials"]["default"] == 20
    assert "search" in [item["name"] for item in server.client.get("/methods").json()["items"]]


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no evaluation": ({"evaluation": None}, "invalid_request", "/evaluation"),
    "unknown dataset": (
        {"evaluation": {"dataset": "dat_" + "f" * 32}},
        "invalid_request",
        "/evaluation/dataset",
    ),
    "dataset and datasets": (
        {"evaluation": {"dataset": "dat_" + "f" * 32, "datasets": ["dat_" + "f" * 32]}},
        "invalid_request",
        "/evaluation",
    ),
    "the second of two datasets": ({"evaluation": {"datasets": 2}}, "invalid_request", "/evaluation/datasets/1"),
    "unknown metric": ({"evaluation": {"metric": "taste"}}, "invalid_request", "/evaluation/metric"),
    "into the base model": ({"output": "base"}, "invalid_request", "/output"),
    "no trials": ({"parameters": {"trials": 0}}, "invalid_request", "/parameters/trials"),
    "no methods": ({"parameters": {"methods": []}}, "invalid_request", "/parameters/methods"),
    "misspelt": ({"parameters": {"trails": 3}}, "invalid_request", "/parameters/trails"),
    "method without a name": ({"parameters": {"methods": [{}]}}, "invalid_request", "/parameters/methods/0/method"),
    "unknown method": (
        {"parameters": {"methods": [*METHODS, {"method": "search"}]}},
        "invalid_request",
        "/parameters/methods/2/method",
    ),
    "unknown parameter": (
        {"parameters": {"methods": [{"method": "svd", "parameters": {"colour": 1}}]}},
        "invalid_request",
        "/parameters/methods/0/parameters/colour",
    ),
    "range turned round": (
        {"parameters": {"weights": [{"low": 1, "high": 0}]}},
        "invalid_request",
        "/parameters/weights/0",
    ),
    "rank above the sum": ({"parameters": {"ranks": [2, 9]}}, "rank_out_of_range", "/parameters/ranks"),
    "fixed rank above the sum": (
        {"parameters": {"methods": [{"method": "svd", "parameters": {"rank": 9}}]}},
        "rank_out_of_range",
        "/parameters/methods/0/parameters/rank",
    ),
    "a range of ranks that ends above the sum": (
        {"parameters": {"methods": [{"method": "lego", "parameters": {"k": {"low": 1, "high": 9}}}]}},
        "rank_out_of_range",
        "/parameters/methods/0/parameters/k",
    ),
    "weights that one method does not take": (
        {"parameters": {"weights": [{"low": -1, "high": 1}]}},
        "invalid_request",
        "/parameters/weights",
    ),
    "unknown base model": (
        {"evaluation": {"base_model": "nobody/knows"}},
        "invalid_request",
        "/evaluation/base_model",
    ),
    "unknown adapter": ({"adapters": [{"id": "adp_" + "f" * 32}]}, "invalid_request", "/adapters/0/id"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_searches_are_refused_at_once(server: Any, two_adapters: list[str], dataset: str, name: str) -> None:
    changes, code, pointer = REFUSED[name]
    wanted = {**changes}
    evaluation = wanted.get("evaluation")
    if evaluation is not None:
        if evaluation.get("datasets") == 2:
            wanted["evaluation"] = {"datasets": [dataset, "dat_" + "e" * 32]}
        elif not {"dataset", "datasets"} & evaluation.keys():
            wanted["evaluation"] = {"dataset": dataset, **evaluation}
    response = server.client.post("/merge", json=body(two_adapters, dataset, **wanted))
    assert (response.status_code, response.json()["code"]) == (422, code), response.text
    assert pointer in [item["pointer"] for item in response.json()["errors"]], response.text
    assert server.rows()["jobs"] == 0


def test_an_evaluation_belongs_to_a_search(server: Any, two_adapters: list[str], dataset: str) -> None:
    response = server.client.post("/merge", json=body(two_adapters, dataset, method="svd", parameters={}))
    assert response.status_code == 422
    plain = {"adapters": [{"id": two_adapters[0]}], "method": "svd", "evaluation": {"dataset": dataset}}
    response = server.client.post("/merge", json=plain)
    assert [item["pointer"] for item in response.json()["errors"]] == ["/evaluation"]


def test_a_schedule_takes_a_search(server: Any, two_adapters: list[str], dataset: str) -> None:
    schedule = {
        "name": "weekly",
        "trigger": {"cron": "0 3 * * 1"},
        "job": {"kind": "merge", "params": body(two_adapters, dataset, parameters={"trials": 0})},
    }
    refused = server.client.post("/schedules", json=schedule)
    assert refused.status_code == 422
    assert [item["pointer"] for item in refused.json()["errors"]] == ["/job/params/parameters/trials"]
    schedule["job"]["params"] = body(two_adapters, dataset)  # type: ignore[index]
    assert server.client.post("/schedules", json=schedule).status_code == 201


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_over_two_real_tasks_finds_a_merge_that_serves_both(serve: Any) -> None:
    from examples.smollm2.base_model import base_model_directory
    from examples.smollm2.tasks import TASKS, make_items

    base = base_model_directory()
    server = serve(pool="local", devices="cpu:1", max_wait_seconds=60, model_roots=(base.parent,))
    model = server.client.post("/models", json={"path": str(base), "name": "smollm2"}, timeout=120).json()["id"]
    adapters, datasets = [], []
    for task in ("dates", "orders"):
        folder = Path("examples") / "adapters" / task
        files = [("file", (path.name, path.read_bytes())) for path in sorted(folder.glob("adapter_*"))]
        adapters.append(server.upload(files, {"name": task, "base_model": model}).json()["id"])
        items = make_items(TASKS[task], "held_out", 6, seed=3)
        rows = "".join(json.dumps({"prompt": item.prompt, "completion": item.completion}) + "\n" for item in items)
        dataset = server.client.post("/datasets", files={"file": (f"{task}.jsonl", rows.encode())})
        datasets.append(dataset.json()["id"])
    wanted = {
        "adapters": [{"id": key} for key in adapters],
        "method": "search",
        "parameters": {
            "methods": [{"method": "svd"}, {"method": "tsv_m"}],
            "weights": [{"low": 0.3, "high": 1.2}],
            "ranks": [16, 8],
            "trials": 6,
            "seed": 1,
        },
        "evaluation": {"datasets": datasets, "metric": "loss", "max_rows": 6},
        "name": "both",
    }

    def finished(body: dict[str, Any]) -> dict[str, Any]:
        job = server.client.post("/merge", json=body).json()
        while job["state"] in ("queued", "running"):
            job = server.client.get(f"/jobs/{job['id']}", headers={"Prefer": "wait=60"}, timeout=90).json()
        assert job["state"] == "succeeded", job
        return job

    job = finished(wanted)
    report = job["result"]["report"]
    best = report["trials"][report["best"]]
    alone = report["evaluation"]["datasets"]
    # far better than the base model on either task, and no worse than the plain sum
    assert all(
        part["figures"]["loss"] < 0.2 * item["base"]["loss"] for part, item in zip(best["datasets"], alone, strict=True)
    )
    assert best["value"] <= report["trials"][0]["value"]
    assert best["difference"]["loss"]["high"] < 0
    assert len({json.dumps([item["method"], item["parameters"], item["weights"]]) for item in report["trials"]}) == 6
    pictures = server.client.get(f"/jobs/{job['id']}/pictures").json()["items"]
    assert [item["name"] for item in pictures] == ["trials", "interference", "errors"]
    assert server.client.get(pictures[0]["link"]).text.count("<circle") == 6 + 2
    (made,) = job["result"]["adapters"]
    recipe = server.client.get(f"/adapters/{made}/recipe").json()
    assert (recipe["reproducible"], recipe["call"]["body"]["method"]) == (True, best["method"])
    assert [item["weight"] for item in recipe["call"]["body"]["adapters"]] == best["weights"]
    assert recipe["found_by"]["body"]["parameters"] == wanted["parameters"]
    first = server.client.get(f"/adapters/{made}").json()
    server.client.delete(f"/adapters/{made}")
    again = finished(recipe["call"]["body"])
    assert server.client.get(f"/adapters/{again['result']['adapters'][0]}").json()["files"] == first["files"]
