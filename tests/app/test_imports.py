"""POST /adapters/import: what is taken and what is refused when it is submitted, before anything is asked elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.settings import Settings
from storage import jobs

HUB = {"hub": {"repo": "acme/mine"}}


@pytest.fixture(scope="module")
def importing(module_servers: Any) -> Any:
    return module_servers(
        hub_tokens={"org": "hf_s3cret"},
        import_hosts=("files.example.org", "*.cdn.example.org"),
        import_tokens={"files.example.org": "t0ken"},
        import_buckets=("s3://open", "s3://shared/loras"),
    )


def test_an_import_is_a_job_that_holds_no_secret(importing: Any) -> None:
    body = {"source": {"hub": {"repo": "acme/mine", "token": "org"}}, "name": "mine", "tags": ["a"]}
    response = importing.client.post("/adapters/import", json=body)
    assert response.status_code == 202, response.text
    job = response.json()
    assert job["kind"] == "import"
    assert job["params"]["source"]["hub"] == {"repo": "acme/mine", "revision": "main", "path": None, "token": "org"}
    assert "s3cret" not in response.text


def test_no_answer_shows_the_query_of_a_url_and_a_retry_has_it(importing: Any) -> None:
    url = "https://files.example.org/a.zip"
    source = {"url": f"{url}?signature=s3cret", "sha256": "0" * 64}
    asked = importing.client.post("/adapters/import", json={"source": source})
    job_id = asked.json()["id"]
    assert asked.json()["params"]["source"] == {"hub": None, "url": url, "s3": None, "sha256": "0" * 64}
    schedule = {
        "name": "nightly",
        "trigger": {"cron": "0 3 * * *"},
        "job": {"kind": "import", "params": {"source": source}},
    }
    importing.client.post(f"/jobs/{job_id}/cancel")
    retried = importing.client.post(f"/jobs/{job_id}/retry")
    answers = [
        asked,
        retried,
        importing.client.get(f"/jobs/{job_id}"),
        importing.client.get("/jobs"),
        importing.client.post("/schedules", json=schedule),
        importing.client.get("/schedules"),
    ]
    for answer in answers:
        assert answer.is_success, answer.text
        assert url in answer.text
        assert "s3cret" not in answer.text
    with importing.services.database.read() as session:
        assert jobs.get_job(session, retried.json()["id"]).params["source"]["url"] == source["url"]


@pytest.mark.parametrize(
    ("source", "pointer"),
    [
        ({}, "/source"),
        ({**HUB, "url": "https://files.example.org/a"}, "/source"),
        ({"hub": {"repo": "../../etc"}}, "/source/hub/repo"),
        ({"hub": {"repo": "a/b", "path": "../x"}}, "/source/hub/path"),
        ({"hub": {"repo": "a/b", "token": "nobody"}}, "/source/hub/token"),
        ({"hub": {"repo": "a/b", "token": "hf_" + "x" * 80}}, "/source/hub/token"),
        ({"url": "https://elsewhere.org/a.safetensors"}, "/source/url"),
        ({"url": "https://files.example.org.evil.org/a"}, "/source/url"),
        ({"url": "https://cdn.example.org/a"}, "/source/url"),
        ({"url": "http://files.example.org/a"}, "/source/url"),
        ({"url": "https://user:password@files.example.org/a"}, "/source/url"),
        ({"url": "https://169.254.169.254/latest"}, "/source/url"),
        ({"url": "file:///etc/passwd"}, "/source/url"),
        ({"s3": {"bucket": "closed", "key": "a.zip"}}, "/source/s3"),
        ({"s3": {"bucket": "shared", "key": "lorasecret/a.zip"}}, "/source/s3"),
        ({"s3": {"bucket": "open"}}, "/source/s3"),
        ({**HUB, "sha256": "abc"}, "/source/sha256"),
    ],
)
def test_sources_that_are_refused(importing: Any, source: dict[str, Any], pointer: str) -> None:
    response = importing.client.post("/adapters/import", json={"source": source})
    assert response.status_code == 422, response.text
    assert [item["pointer"] for item in response.json()["errors"]] == [pointer]


@pytest.mark.parametrize(
    "source",
    [
        {"url": "https://files.example.org/a.safetensors"},
        {"url": "https://one.cdn.example.org/a"},
        {"s3": {"bucket": "open", "key": "any/thing.zip"}},
        {"s3": {"bucket": "shared", "prefix": "loras/mine/"}},
    ],
)
def test_sources_that_are_taken(importing: Any, source: dict[str, Any]) -> None:
    response = importing.client.post("/adapters/import", json={"source": source})
    assert response.status_code == 202, response.text


def test_a_base_model_that_is_not_there_and_a_server_without_a_hub(importing: Any, serve: Any) -> None:
    body = {"source": HUB, "base_model": "mdl_" + "0" * 32}
    response = importing.client.post("/adapters/import", json=body)
    assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "/base_model")
    response = serve(hub_endpoint="off").client.post("/adapters/import", json={"source": HUB})
    assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "/source/hub")
    assert "RANKWISE_HUB_ENDPOINT" in response.json()["hint"]


def test_settings_of_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKWISE_IMPORT_HOSTS", "a.org, *.b.org")
    monkeypatch.setenv("RANKWISE_IMPORT_ALLOWED_NETWORKS", "10.0.0.0/8,127.0.0.1")
    monkeypatch.setenv("RANKWISE_HUB_TOKENS", '{"default": "hf_s3cret"}')
    monkeypatch.setenv("RANKWISE_HUB_ENDPOINT", "http://hub.internal:8080/")
    settings = Settings()
    assert settings.import_hosts == ("a.org", "*.b.org")
    assert [str(network) for network in settings.import_allowed_networks] == ["10.0.0.0/8", "127.0.0.1/32"]
    assert settings.hub_endpoint == "http://hub.internal:8080"
    assert "s3cret" not in repr(settings)
    for name, value in (("RANKWISE_HUB_ENDPOINT", "ftp://hub"), ("RANKWISE_IMPORT_BUCKETS", "bucket")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(ValidationError):
                Settings()
