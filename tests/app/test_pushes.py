"""POST /adapters/{id}/push: what is taken and what is refused when it is submitted."""

from __future__ import annotations

from typing import Any

import pytest

HUB = {"hub": {"repo": "acme/mine"}}


@pytest.fixture(scope="module")
def pushing(module_servers: Any) -> Any:
    return module_servers(
        hub_tokens={"default": "hf_s3cret"}, push_namespaces=("acme",), push_buckets=("s3://registry/adapters",)
    )


@pytest.fixture
def path(pushing: Any, adapter_files: Any) -> str:
    response = pushing.upload(adapter_files().parts(), {"name": "mine"})
    return f"/adapters/{response.json()['id']}/push"


def test_a_push_is_a_job_that_is_private_unless_it_says_otherwise(pushing: Any, path: str) -> None:
    response = pushing.client.post(path, json=HUB)
    assert response.status_code == 202, response.text
    params = response.json()["params"]
    assert (response.json()["kind"], params["hub"]["private"], params["format"]) == ("push", True, "peft")
    assert "s3cret" not in response.text
    oci = {"oci": {"s3": {"bucket": "registry", "prefix": "adapters/mine/"}, "tag": "v1"}, "dtype": "bfloat16"}
    response = pushing.client.post(path, json=oci)
    assert response.status_code == 202, response.text
    assert response.json()["params"]["oci"]["s3"]["prefix"] == "adapters/mine"


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, ""),
        ({**HUB, "oci": {"s3": {"bucket": "registry", "prefix": "adapters"}}}, ""),
        ({"hub": {"repo": "other/mine"}}, "/hub/repo"),
        ({"hub": {"repo": "mine"}}, "/hub/repo"),
        ({"hub": {"repo": "acme/mine", "token": "nobody"}}, "/hub/token"),
        ({"hub": {"repo": "acme/mine", "path": "../up"}}, "/hub/path"),
        ({"oci": {"s3": {"bucket": "registry", "prefix": "adapters2"}}}, "/oci/s3"),
        ({"oci": {"s3": {"bucket": "registry", "prefix": "adapters"}, "tag": "-x"}}, "/oci/tag"),
        ({**HUB, "format": "kohya"}, "/format"),
        ({**HUB, "format": "zip"}, "/format"),
    ],
)
def test_pushes_that_are_refused(pushing: Any, path: str, body: dict[str, Any], pointer: str) -> None:
    response = pushing.client.post(path, json=body)
    assert response.status_code == 422, response.text
    assert [item["pointer"] for item in response.json()["errors"]] == [pointer]


def test_nothing_is_sent_anywhere_without_settings(server: Any, adapter_files: Any) -> None:
    adapter_id = server.upload(adapter_files().parts()).json()["id"]
    response = server.client.post(f"/adapters/{adapter_id}/push", json=HUB)
    assert response.status_code == 422
    assert "RANKWISE_PUSH_NAMESPACES" in response.json()["hint"]
    assert server.client.post(f"/adapters/adp_{'f' * 32}/push", json=HUB).status_code == 404
