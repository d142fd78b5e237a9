"""POST /merge: what is accepted, what is refused when it is submitted, waiting, idempotency, the full queue."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest
from patience import wait_for


def test_a_merge_is_a_queued_job(server: Any, two_adapters: list[str]) -> None:
    body = {
        "adapters": [{"id": two_adapters[0]}, {"id": two_adapters[1], "weight": 0.5}],
        "method": "lego",
        "parameters": {"rank": 4, "seed": 7},
        "name": "both",
    }
    response = server.client.post("/merge", json=body, headers={"X-Request-ID": "my-own-id"})
    assert response.status_code == 202, response.text
    job = response.json()
    assert response.headers["location"] == f"/jobs/{job['id']}"
    assert set(job) == {
        "id", "kind", "state", "attempt", "progress", "params", "result", "error", "created_at", "started_at",
        "finished_at", "position", "waiting", "eta_seconds", "cancel_requested", "resources", "retry_of", "schedule_id",
        "warnings",
    }  # fmt: skip
    assert (job["kind"], job["state"], job["attempt"], job["position"]) == ("merge", "queued", 0, 1)
    assert job["progress"] == {"fraction": 0.0, "step": None, "total": None, "message": ""}
    assert job["params"] == {
        "adapters": [{"id": two_adapters[0], "weight": 1.0}, {"id": two_adapters[1], "weight": 0.5}],
        "method": "lego",
        "parameters": {"rank": 4, "seed": 7},
        "name": "both",
        "output": "adapter",
        "base_model": None,
        "dtype": "auto",
        "force": False,
        "target_engine": None,
        "convert": False,
        "evaluation": None,
    }
    assert (job["result"], job["error"], job["started_at"], job["cancel_requested"]) == (None, None, None, False)
    shown = server.client.get(f"/jobs/{job['id']}").json()
    assert shown.pop("waiting")["reason"] == "no_server"
    assert {**shown, "waiting": None} == job
    from storage import jobs

    with server.services.database.read() as session:
        assert jobs.get_job(session, job["id"]).request_id == "my-own-id"


@pytest.mark.parametrize("name", ["rank", "k"])
def test_lego_takes_its_rank_under_both_names(server: Any, two_adapters: list[str], name: str) -> None:
    body = {"adapters": [{"id": key} for key in two_adapters], "method": "lego", "parameters": {name: 8}}
    assert server.client.post("/merge", json=body).status_code == 202


def merge(ids: list[str], **changes: Any) -> dict[str, Any]:
    return {"adapters": [{"id": key} for key in ids], "method": "lego", **changes}


def weighted(ids: list[str], *weights: Any) -> dict[str, Any]:
    return merge(ids, adapters=[{"id": key, "weight": weight} for key, weight in zip(ids, weights, strict=True)])


UNKNOWN = "adp_" + "f" * 32
REFUSED: dict[str, tuple[Any, str, str]] = {
    "unknown adapter": (lambda ids: merge([ids[0], UNKNOWN]), "invalid_request", "/adapters/1/id"),
    "malformed id": (lambda ids: merge([ids[0], "adp_1"]), "invalid_request", "/adapters/1/id"),
    "the same id twice": (lambda ids: merge([ids[0], ids[0]]), "invalid_request", "/adapters/1/id"),
    "no adapters": (lambda ids: merge([]), "invalid_request", "/adapters"),
    "unknown method": (lambda ids: merge(ids, method="magic"), "invalid_request", "/method"),
    "unknown parameter": (lambda ids: merge(ids, parameters={"colour": 1}), "invalid_request", "/parameters/colour"),
    "rank 0": (lambda ids: merge(ids, parameters={"rank": 0}), "invalid_request", "/parameters/rank"),
    "rank above the sum": (lambda ids: merge(ids, parameters={"rank": 9}), "rank_out_of_range", "/parameters/rank"),
    "k above the sum": (lambda ids: merge(ids, parameters={"k": 9}), "rank_out_of_range", "/parameters/k"),
    "negative weight": (lambda ids: weighted(ids, 1.0, -1.0), "invalid_request", "/adapters/1/weight"),
    "all weights zero": (lambda ids: weighted(ids, 0.0, 0), "invalid_request", "/adapters"),
    "weight as text": (lambda ids: weighted(ids, 1.0, "1"), "invalid_request", "/adapters/1/weight"),
    "weight out of range": (lambda ids: weighted(ids, 1.0, 1e300), "invalid_request", "/adapters/1/weight"),
    "a list of weights": (
        lambda ids: merge(ids, parameters={"weights": [1.0, 2.0, 3.0]}),
        "invalid_request",
        "/parameters/weights",
    ),
    "unknown engine": (lambda ids: merge(ids, target_engine="vLLM"), "invalid_request", "/target_engine"),
    "an engine of other models": (lambda ids: merge(ids, target_engine="kohya"), "invalid_request", "/target_engine"),
    "an engine for a model": (
        lambda ids: merge(ids, output="base", target_engine="vllm"),
        "invalid_request",
        "",
    ),
    "unknown field": (lambda ids: merge(ids, adapter="x"), "invalid_request", "/adapter"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_merges_are_refused_at_once(server: Any, two_adapters: list[str], name: str) -> None:
    build, code, pointer = REFUSED[name]
    before = server.rows()
    response = server.client.post("/merge", json=build(two_adapters), headers={"Idempotency-Key": "once"})
    assert response.status_code == 422, response.text
    problem = response.json()
    assert problem["code"] == code
    assert pointer in [item["pointer"] for item in problem["errors"]]
    assert server.rows() == before


def test_a_weight_of_nan_is_no_json(server: Any, two_adapters: list[str]) -> None:
    for text in ("NaN", "Infinity", "-Infinity", "1e999"):
        body = f'{{"adapters":[{{"id":"{two_adapters[0]}","weight":{text}}}],"method":"lego"}}'
        response = server.client.post("/merge", content=body, headers={"Content-Type": "application/json"})
        assert (response.status_code, response.json()["code"]) == (400, "malformed_request")
    assert server.rows()["jobs"] == 0


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"config": {"use_dora": True}}, "not_mergeable"),
        ({"base_model": "other/model"}, "base_model_mismatch"),
        ({"d_in": 10}, "shape_mismatch"),
    ],
    ids=["dora", "other base", "other shapes"],
)
def test_adapters_that_do_not_go_together(
    server: Any, adapter_files: Any, make_safetensors: Any, changes: dict[str, Any], code: str
) -> None:
    files = adapter_files(seed=2, **changes)
    tensors = files.tensors()
    if "config" in changes:  # a DoRA file has a magnitude for each module
        for path in files.modules:
            key = f"base_model.model.{path}.lora_magnitude_vector"
            tensors[key] = ("F32", [files.d_out], files.numbers(files.d_out, 9))
    first = server.upload(adapter_files(seed=1).parts())
    second = server.upload([("file", ("adapter_model.safetensors", make_safetensors(tensors))), files.parts()[1]])
    assert second.status_code == 201, second.text
    ids = [first.json()["id"], second.json()["id"]]
    response = server.client.post("/merge", json=merge(ids))
    assert (response.status_code, response.json()["code"]) == (422, code), response.text
    assert response.json()["errors"]
    assert server.rows()["jobs"] == 0


def test_a_deleted_adapter_is_unknown(server: Any, two_adapters: list[str]) -> None:
    server.client.delete(f"/adapters/{two_adapters[1]}")
    response = server.client.post("/merge", json=merge(two_adapters))
    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"] == "/adapters/1/id"


def test_prefer_wait_gives_the_finished_job(server: Any, two_adapters: list[str], fake_pool: Any) -> None:
    pool = fake_pool(server)
    answers: list[httpx.Response] = []

    def submit() -> None:
        with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as client:
            answers.append(client.post("/merge", json=merge(two_adapters), headers={"Prefer": "wait=30"}))

    waiting = threading.Thread(target=submit)
    waiting.start()
    wait_for(lambda: server.client.get("/jobs", params={"state": "queued"}).json()["items"])
    job = pool.claim()
    pool.succeed(job, {"adapters": [two_adapters[0]], "images": [], "report": {"energy": 0.9}})
    waiting.join(timeout=30)
    (answer,) = answers
    assert answer.status_code == 200, answer.text
    assert answer.headers["preference-applied"] == "wait"
    assert answer.json()["state"] == "succeeded"
    assert answer.json()["result"]["report"] == {"energy": 0.9}
    assert "position" not in answer.json()


def test_prefer_wait_that_runs_out_is_202(server: Any, two_adapters: list[str]) -> None:
    response = server.client.post("/merge", json=merge(two_adapters), headers={"Prefer": "respond-async, wait=0"})
    assert response.status_code == 202
    job = response.json()["id"]
    held = server.client.get(f"/jobs/{job}", headers={"Prefer": "wait=1"})
    assert (held.status_code, held.json()["state"]) == (200, "queued")
    assert "preference-applied" not in held.headers


def test_full_queue(serve: Any, adapter_files: Any) -> None:
    server = serve(max_queued_jobs=1)
    adapter = server.upload(adapter_files().parts()).json()["id"]
    assert server.client.post("/merge", json=merge([adapter])).status_code == 202
    response = server.client.post("/merge", json=merge([adapter]), headers={"Idempotency-Key": "a"})
    assert (response.status_code, response.json()["code"]) == (429, "queue_full")
    assert response.headers["retry-after"] == "10"
    assert server.rows()["jobs"] == 1
    assert server.rows()["idempotency_keys"] == 0


def test_idempotency_key_gives_the_first_answer_again(server: Any, two_adapters: list[str]) -> None:
    headers = {"Idempotency-Key": "merge-1"}
    first = server.client.post("/merge", json=merge(two_adapters), headers=headers)
    server.client.post(f"/jobs/{first.json()['id']}/cancel")
    again = server.client.post("/merge", json=merge(two_adapters), headers=headers)
    assert (again.status_code, again.json()) == (first.status_code, first.json())
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["idempotency-replayed"] == "true"
    assert "idempotency-replayed" not in first.headers
    assert server.rows()["jobs"] == 1
    other = server.client.post("/merge", json=merge(two_adapters, name="other"), headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert server.rows()["jobs"] == 1


def test_the_same_idempotency_key_at_once_makes_one_job(server: Any, two_adapters: list[str]) -> None:
    together = threading.Barrier(6)
    answers: list[httpx.Response] = []

    def submit() -> None:
        with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as client:
            together.wait()
            answers.append(client.post("/merge", json=merge(two_adapters), headers={"Idempotency-Key": "same"}))

    threads = [threading.Thread(target=submit) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert server.rows()["jobs"] == 1
    assert server.rows()["job_events"] == 1


def blocks_of(files: Any, make_safetensors: Any, name: str) -> list[Any]:
    """The same modules as an adapter of MiSS, or of BONE as it was called."""
    key = "base_model.model.{}." + name.lower() + "_block"
    shape = [files.rank, files.d_out]
    tensors = {key.format(path): ("F32", shape, files.numbers(files.rank * files.d_out, 5)) for path in files.modules}
    files.config.update({"peft_type": name, "init_weights": True})
    return [("file", ("adapter_model.safetensors", make_safetensors(tensors))), files.parts()[1]]


def test_an_old_bone_adapter_goes_into_a_merge_beside_one_that_tells_the_sides(
    server: Any, adapter_files: Any, make_safetensors: Any
) -> None:
    bone = server.upload(blocks_of(adapter_files(seed=3), make_safetensors, "BONE"))
    assert bone.status_code == 201, bone.text
    body = bone.json()
    assert (body["method"], body["mergeable"]) == ("miss", True)
    assert any("renamed" in warning for warning in body["report"]["warnings"])
    again = server.upload(blocks_of(adapter_files(seed=3), make_safetensors, "MISS"))
    assert (again.status_code, again.json()["id"]) == (200, body["id"])
    alone = server.client.post("/merge", json=merge([body["id"]], method="cat", parameters={}))
    assert (alone.status_code, alone.json()["code"]) == (422, "merge_refused"), alone.text
    assert "do not tell the sides" in alone.json()["detail"]
    lora = server.upload(adapter_files(seed=1).parts()).json()
    response = server.client.post("/merge", json=merge([body["id"], lora["id"]]))
    assert response.status_code == 202, response.text
