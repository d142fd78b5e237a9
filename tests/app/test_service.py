"""The service itself: index, health, methods, workers, metrics, problems, and what every answer has."""

from __future__ import annotations

import re
from typing import Any

import pytest

from app import problems, service_state
from artifacts import errors


def test_index_health_and_readiness(untouched_server: Any) -> None:
    index = untouched_server.client.get("/").json()
    assert index["name"] == "rankwise"
    assert index["links"]["docs"] == "/docs"
    assert untouched_server.client.get("/healthz").json() == {"status": "ok"}
    assert untouched_server.client.get("/readyz").json() == {
        "status": "ready",
        "checks": {"database": "ok", "blobs": "ok", "pool": "off"},
    }


def test_readiness_without_a_blob_store(server: Any) -> None:
    folder = server.services.staging
    folder.rmdir()
    folder.write_bytes(b"in the way")
    response = server.client.get("/readyz")
    assert (response.status_code, response.json()["code"]) == (503, "not_ready")
    assert [item["pointer"] for item in response.json()["errors"]] == ["/checks/blobs"]
    folder.unlink()
    folder.mkdir()


def test_readiness_needs_the_pool_that_is_configured(server: Any) -> None:
    server.services.settings = server.services.settings.model_copy(update={"pool": "local"})
    response = server.client.get("/readyz")
    assert response.status_code == 503
    assert [item["pointer"] for item in response.json()["errors"]] == ["/checks/pool"]


def test_methods_are_the_menus(untouched_server: Any) -> None:
    items = untouched_server.client.get("/methods").json()["items"]
    kinds = ("merge", "compose", "train", "transfer")
    menus = {kind: [item["name"] for item in items if item["kind"] == kind] for kind in kinds}
    assert menus["merge"][:4] == ["lego", "cat", "svd", "linear"]
    assert {"core_space", "ties_svd", "slerp"} <= set(menus["merge"])
    assert {"merge", "clora"} <= set(menus["compose"])
    assert menus["train"][:3] == ["lora", "rslora", "dora"]
    assert menus["transfer"][0] == "trans-lora"
    assert len(items) == sum(map(len, menus.values()))
    lego = untouched_server.client.get("/methods/merge/lego").json()
    assert lego["arxiv"] == "2409.16167"
    properties = lego["parameters_schema"]["properties"]
    assert {"rank", "n_init", "sign_alignment"} <= set(properties)
    assert lego["parameters_schema"]["additionalProperties"] is False
    for path in ("merge/magic", "compose/magic"):
        assert untouched_server.client.get(f"/methods/{path}").status_code == 404


def test_workers_are_those_who_gave_a_sign_of_life(server: Any, fake_pool: Any) -> None:
    assert server.client.get("/workers").json() == {"items": []}
    fake_pool(server)
    (item,) = server.client.get("/workers").json()["items"]
    assert (item["id"], item["host"], item["pool"]) == ("srv_fake", "here", "local")
    (slot,) = item["slots"]
    assert {name: value for name, value in slot.items() if value} == {"name": "cpu:0", "device": "cpu", "state": "idle"}
    assert slot.keys() == {"name", "device", "host", "state", "pid", "job_id", "attempt", "warm", "problem"}


def test_metrics_count_by_route_template(server: Any, two_adapters: list[str], fake_pool: Any) -> None:
    fake_pool(server)
    server.client.post("/merge", json={"adapters": [{"id": two_adapters[0]}]})
    for adapter in two_adapters:
        server.client.get(f"/adapters/{adapter}")
    server.client.get("/nowhere/at/all")
    response = server.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    for expected in (
        'rankwise_http_requests_total{method="GET",route="/adapters/{adapter_id}",status="200"} 2.0',
        'rankwise_http_requests_total{method="POST",route="/adapters",status="201"} 2.0',
        'rankwise_http_requests_total{method="GET",route="unmatched",status="404"} 1.0',
        'rankwise_uploads_total{outcome="created"} 2.0',
        'rankwise_jobs_submitted_total{kind="merge"} 1.0',
        'rankwise_jobs{state="queued"} 1.0',
        'rankwise_slots{device="cpu",state="idle"} 1.0',
        "rankwise_database_up 1.0",
    ):
        assert expected in lines
    assert two_adapters[0] not in response.text


def test_request_ids_come_back_or_are_made(untouched_server: Any) -> None:
    assert untouched_server.client.get("/", headers={"X-Request-ID": "abc-1.2"}).headers["x-request-id"] == "abc-1.2"
    for harmful in ("a b", "x" * 65, "é".encode()):
        made = untouched_server.client.get("/", headers={"X-Request-ID": harmful}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", made)


def test_unknown_paths_and_methods_are_problems(untouched_server: Any) -> None:
    missing = untouched_server.client.get("/nowhere")
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    assert missing.headers["content-type"] == "application/problem+json"
    slash = untouched_server.client.get("/adapters/")
    assert slash.status_code == 404
    wrong = untouched_server.client.put("/adapters")
    assert (wrong.status_code, wrong.json()["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "GET, POST"
    assert untouched_server.client.post(f"/adapters/adp_{'0' * 32}").headers["allow"] == "DELETE, GET"
    assert untouched_server.client.delete(f"/adapters/adp_{'0' * 32}/download").headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code"),
    [
        (b"{", "application/json", 400, "malformed_request"),
        (b"\xff\xfe", "application/json", 400, "malformed_request"),
        (b'{"hub_id": "\\ud800"}', "application/json", 400, "malformed_request"),
        (b'{"hub_id": "a\\u0000b"}', "application/json", 400, "malformed_request"),
        (b'{"hub_id": "a/b", "hub_id": "a/c"}', "application/json", 400, "malformed_request"),
        (b'{"hub_id": ' + b"9" * 5000 + b"}", "application/json", 400, "malformed_request"),
        (b"[" * 100_000, "application/json", 400, "malformed_request"),
        (b'{"hub_id": "a/b"}', "text/plain", 415, "unsupported_media"),
        (b"hub_id=a", "application/x-www-form-urlencoded", 415, "unsupported_media"),
        (b"", "application/json", 422, "invalid_request"),
        (b"null", "application/json", 422, "invalid_request"),
        (b'{"hub_id": "' + b"a" * 2_000_000 + b'"}', "application/json", 413, "too_large"),
    ],
)
def test_bad_json_bodies(untouched_server: Any, body: bytes, content_type: str, status: int, code: str) -> None:
    response = untouched_server.client.post("/models", content=body, headers={"Content-Type": content_type})
    assert (response.status_code, response.json()["code"]) == (status, code)
    untouched_server.assert_nothing_left()


def test_a_body_without_a_length_is_cut_off_at_the_limit(untouched_server: Any) -> None:
    chunks = (b"x" * 65536 for _ in range(32))
    response = untouched_server.client.post("/models", content=chunks, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (413, "too_large")


@pytest.mark.parametrize(
    ("path", "pointer"),
    [
        ("/adapters?limit=0", "/query/limit"),
        ("/adapters?limit=201", "/query/limit"),
        ("/adapters?limit=99999999999999999999999", "/query/limit"),
        ("/adapters?cursor=%00", "/query/cursor"),
        ("/adapters?name=a%00b", "/query/name"),
        ("/adapters?sha256=xyz", "/query/sha256"),
        ("/adapters?colour=red", "/query/colour"),
        ("/adapters?cursor=bm90LWEtY3Vyc29y", "/cursor"),
        ("/adapters/%00", "/path/adapter_id"),
        ("/adapters/adp_ABCDEF", "/path/adapter_id"),
    ],
)
def test_bad_parameters_are_pointed_at(untouched_server: Any, path: str, pointer: str) -> None:
    response = untouched_server.client.get(path)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    assert response.json()["errors"][0]["pointer"] == pointer


def test_a_bad_idempotency_key(untouched_server: Any) -> None:
    response = untouched_server.client.post("/models", json={"hub_id": "a/b"}, headers={"Idempotency-Key": "x" * 256})
    assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "/header/Idempotency-Key")
    untouched_server.assert_nothing_left()


def test_a_bug_is_500_and_tells_nothing(untouched_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*arguments: Any) -> None:
        raise RuntimeError("the secret of the house")

    monkeypatch.setattr(service_state.claims, "list_servers", explode)
    response = untouched_server.client.get("/workers")
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["code"] == "internal_error"
    assert problem["request_id"] == response.headers["x-request-id"]
    assert "secret" not in response.text
    assert "Traceback" not in response.text


def test_every_code_is_explained(untouched_server: Any) -> None:
    items = untouched_server.client.get("/problems").json()["items"]
    codes = {item["code"] for item in items}
    assert {"file_broken", "queue_full", "pickle_refused", "method_not_allowed", "not_ready"} <= codes
    kind = untouched_server.client.get("/nowhere").json()["type"]
    assert untouched_server.client.get(kind).json() == {"code": "not_found", "status": 404, "title": "Not found"}
    assert untouched_server.client.get("/problems/never_heard_of").status_code == 404


def test_pointers_escape_as_rfc_6901() -> None:
    assert problems.pointer_of(("body", "a/b", 0, "c~d")) == "/a~1b/0/c~0d"
    assert problems.pointer_of(("query", "limit")) == "/query/limit"
    assert problems.pointer_of(("body",)) == ""


def test_a_problem_survives_text_that_is_not_utf8() -> None:
    scope: dict[str, Any] = {"state": {"request_id": "r"}}
    response = problems.problem_of(scope, errors.FileBroken("bad name \udc80"))
    assert b"bad name ?" in response.body
