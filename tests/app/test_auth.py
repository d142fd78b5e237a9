"""API keys: scopes, expiry, and what stays open without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from storage import keys

Bearer = Callable[..., dict[str, str]]


@pytest.fixture
def guarded(serve: Any) -> Any:
    return serve(api_keys=True)


@pytest.fixture
def bearer(guarded: Any) -> Bearer:
    """Headers of a new key with these scopes."""

    def make(*scopes: str) -> dict[str, str]:
        with guarded.services.database.write() as session:
            _, secret = keys.create_key(session, "test", scopes)
        return {"Authorization": f"Bearer {secret}"}

    return make


def test_without_a_key_only_health_and_docs_are_open(guarded: Any) -> None:
    for path in ("/", "/healthz", "/readyz", "/docs", "/openapi.json", "/problems"):
        assert guarded.client.get(path).status_code == 200, path
    for method, path in (
        ("GET", "/adapters"),
        ("POST", "/adapters"),
        ("POST", "/merge"),
        ("GET", "/jobs"),
        ("GET", "/methods"),
        ("GET", "/workers"),
        ("GET", "/metrics"),
        ("GET", f"/adapters/adp_{'0' * 32}/download"),
    ):
        body = {"json": {"adapters": [{"id": "adp_" + "0" * 32}]}} if path == "/merge" else {}
        response = guarded.client.request(method, path, **body)
        assert (response.status_code, response.json()["code"]) == (401, "unauthenticated"), path
        assert response.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer rw_000000000000_" + "a" * 43},
        {"Authorization": "Bearer nonsense"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic YTpi"},
        {"X-API-Key": "rw_"},
        {"X-API-Key": b"\xff\x00\xfe".replace(b"\x00", b"")},
    ],
)
def test_wrong_keys(guarded: Any, headers: dict[str, Any]) -> None:
    response = guarded.client.get("/adapters", headers=headers)
    assert (response.status_code, response.json()["code"]) == (401, "unauthenticated")


def test_scopes_open_what_they_name(guarded: Any, bearer: Bearer, adapter_files: Any) -> None:
    read, write, jobs, admin = (bearer(scope) for scope in ("read", "write", "jobs", "admin"))
    parts = adapter_files().parts()
    assert guarded.upload(parts, headers=read).status_code == 403
    guarded.assert_nothing_left()
    created = guarded.upload(parts, headers=write)
    assert created.status_code == 201, created.text
    url, merge = created.headers["location"], {"adapters": [{"id": created.json()["id"]}]}
    assert guarded.client.get(url, headers=read).status_code == 200
    refused = guarded.client.get(url, headers=write)
    assert (refused.status_code, refused.json()["code"]) == (403, "scope_missing")
    assert guarded.client.post("/merge", json=merge, headers=read).status_code == 403
    assert guarded.client.post("/merge", json=merge, headers=jobs).status_code == 202
    assert guarded.client.post("/merge", json=merge, headers=admin).status_code == 202
    assert guarded.client.delete(url, headers=jobs).status_code == 403
    assert guarded.client.delete(url, headers=admin).status_code == 204
    other = {"X-API-Key": read["Authorization"].removeprefix("Bearer ")}
    assert guarded.client.get("/jobs", headers=other).status_code == 200


def test_a_revoked_key_is_refused_and_uses_are_noted(guarded: Any, bearer: Bearer) -> None:
    headers = bearer("read")
    assert guarded.client.get("/jobs", headers=headers).status_code == 200
    with guarded.services.database.write() as session:
        (row,) = keys.list_keys(session)
        assert row.last_used_at is not None
        keys.revoke_key(session, row.id)
    assert guarded.client.get("/jobs", headers=headers).status_code == 401


def test_idempotency_keys_of_two_owners_are_apart(guarded: Any, bearer: Bearer) -> None:
    first, second = bearer("write"), bearer("write")
    shared = {"Idempotency-Key": "same"}
    one = guarded.client.post("/models", json={"hub_id": "a/one"}, headers={**first, **shared})
    two = guarded.client.post("/models", json={"hub_id": "a/two"}, headers={**second, **shared})
    assert (one.status_code, two.status_code) == (201, 201)


def test_the_document_declares_the_keys(guarded: Any) -> None:
    document = guarded.client.get("/openapi.json").json()
    assert set(document["components"]["securitySchemes"]) == {"bearer", "header"}
    assert document["paths"]["/adapters"]["get"]["security"] == [{"bearer": []}, {"header": []}]
    assert "security" not in document["paths"]["/healthz"]["get"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8000"},
        {"Host": "192.168.0.7"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Host": "[oops"},
        {"Origin": "http://[oops"},
    ],
)
def test_without_keys_other_sites_are_kept_out(untouched_server: Any, headers: dict[str, str]) -> None:
    for method, path in (("GET", "/adapters"), ("POST", "/adapters"), ("POST", f"/jobs/job_{'0' * 32}/cancel")):
        response = untouched_server.client.request(method, path, headers=headers)
        assert (response.status_code, response.json()["code"]) == (403, "foreign_origin")
    untouched_server.assert_nothing_left()


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "localhost:8000"},
        {"Host": "[::1]:8000"},
        {"Host": "rankwise.localhost"},
        {"Origin": "http://localhost:3000"},
    ],
)
def test_names_of_this_machine_are_let_in(untouched_server: Any, headers: dict[str, str]) -> None:
    assert untouched_server.client.get("/adapters", headers=headers).status_code == 200


def test_with_keys_the_name_does_not_matter(guarded: Any, bearer: Bearer) -> None:
    headers = {**bearer("read"), "Host": "rankwise.example", "Origin": "https://rankwise.example"}
    assert guarded.client.get("/adapters", headers=headers).status_code == 200
