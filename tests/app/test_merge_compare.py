"""POST /merge/compare: what is accepted and what is refused when it is submitted; its pictures."""

from __future__ import annotations

from typing import Any

import pytest

CANDIDATES = [{"method": "cat"}, {"method": "svd", "parameters": {"rank": 4}}]


def body(ids: list[str], **changes: Any) -> dict[str, Any]:
    return {"adapters": [{"id": key} for key in ids], "candidates": CANDIDATES, **changes}


def test_a_comparison_is_a_queued_job(server: Any, two_adapters: list[str]) -> None:
    response = server.client.post("/merge/compare", json=body(two_adapters, publish="best"))
    assert response.status_code == 202, response.text
    job = response.json()
    assert (job["kind"], job["state"]) == ("merge_compare", "queued")
    assert job["params"]["candidates"][0] == {"method": "cat", "parameters": {}, "label": None}
    assert job["params"]["publish"] == "best"


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no candidates": ({"candidates": []}, "invalid_request", "/candidates"),
    "unknown method": ({"candidates": [{"method": "magic"}]}, "invalid_request", "/candidates/0/method"),
    "unknown parameter": (
        {"candidates": [*CANDIDATES, {"method": "cat", "parameters": {"colour": 1}}]},
        "invalid_request",
        "/candidates/2/parameters/colour",
    ),
    "rank above the sum": (
        {"candidates": [{"method": "cat"}, {"method": "svd", "parameters": {"rank": 9}}]},
        "rank_out_of_range",
        "/candidates/1/parameters/rank",
    ),
    "k above the sum": (
        {"candidates": [{"method": "cat"}, {"method": "lego", "parameters": {"k": 9}}]},
        "rank_out_of_range",
        "/candidates/1/parameters/k",
    ),
    "unknown publish": ({"publish": "worst"}, "invalid_request", "/publish"),
    "unknown adapter": ({"adapters": [{"id": "adp_" + "f" * 32}]}, "invalid_request", "/adapters/0/id"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_comparisons_are_refused_at_once(server: Any, two_adapters: list[str], name: str) -> None:
    changes, code, pointer = REFUSED[name]
    response = server.client.post("/merge/compare", json=body(two_adapters, **changes))
    assert (response.status_code, response.json()["code"]) == (422, code), response.text
    assert pointer in [item["pointer"] for item in response.json()["errors"]]
    assert server.rows()["jobs"] == 0


def test_one_candidate_that_takes_no_negative_weights_is_named(server: Any, two_adapters: list[str]) -> None:
    wanted = body(two_adapters, candidates=[{"method": "cat"}, {"method": "lego"}])
    wanted["adapters"][1]["weight"] = -1.0
    response = server.client.post("/merge/compare", json=wanted)
    assert response.status_code == 422
    assert "lego" in response.json()["detail"]


def test_the_pictures_of_a_merge_are_made_of_its_report(server: Any, two_adapters: list[str], fake_pool: Any) -> None:
    pool = fake_pool(server)
    job_id = server.client.post("/merge", json={"adapters": [{"id": two_adapters[0]}], "method": "cat"}).json()["id"]
    report = {
        "method": "cat",
        "adapters": [{"id": "adp_1", "name": "a"}, {"id": "adp_2", "name": "b<"}],
        "total": {"interference": [[1.0, -0.25], [-0.25, 1.0]]},
        "modules": [{"path": "layers.0.q", "relative_error": 0.5}],
    }
    pool.succeed(pool.claim(), {"adapters": [], "images": [], "report": report})
    items = server.client.get(f"/jobs/{job_id}/pictures").json()["items"]
    assert [item["name"] for item in items] == ["interference", "errors"]
    picture = server.client.get(items[0]["link"])
    assert picture.headers["content-type"].startswith("image/svg+xml")
    assert "-0.25" in picture.text
    assert "b&lt;" in picture.text


def test_an_evaluation_names_a_dataset_that_can_be_measured_and_a_base_model(
    server: Any, two_adapters: list[str]
) -> None:
    from artifacts.base_model import BaseModelRef
    from storage import models

    rows = b'{"prompt": "a", "completion": "b"}\n'
    dataset = server.client.post("/datasets", files={"file": ("d.jsonl", rows)}).json()["id"]
    unfit = server.client.post("/datasets", files={"file": ("l.jsonl", b'{"x": 1}\n')}).json()["id"]

    def post(**evaluation: Any) -> Any:
        return server.client.post("/merge/compare", json=body(two_adapters, evaluation=evaluation))

    def pointer(response: Any) -> str:
        assert response.status_code == 422, response.text
        found: str = response.json()["errors"][0]["pointer"]
        return found

    assert pointer(post(dataset=dataset)) == "/evaluation/base_model"
    with server.services.database.write() as session:
        model = models.add_model(session, BaseModelRef("acme/tiny-llm", "hub", "acme/tiny-llm"))[0].id
        pipeline = BaseModelRef("pipe", "hub", "acme/pipe", pipeline="StableDiffusionPipeline")
        models.add_model(session, pipeline)
    accepted = post(dataset=dataset, metric="perplexity", max_rows=5)
    assert accepted.status_code == 202, accepted.text
    stored = accepted.json()["params"]["evaluation"]
    assert (stored["base_model"], stored["metric"], stored["max_rows"]) == (model, "perplexity", 5)
    assert pointer(post(dataset="dat_" + "f" * 32)) == "/evaluation/dataset"
    assert pointer(post(dataset=dataset, base_model="pipe")) == "/evaluation/base_model"
    assert pointer(post(dataset=dataset, metric="mcc")) == "/evaluation/metric"
    assert pointer(post(dataset=dataset, max_rows=0)) == "/evaluation/max_rows"
    assert pointer(post(dataset=unfit)) == "/evaluation/dataset"
