"""Aliases over HTTP: made, switched with the version that was seen, downloaded by, and in the way of a delete."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def adapters(server: Any, adapter_files: Any) -> list[str]:
    return [server.upload(adapter_files(seed=seed).parts()).json()["id"] for seed in range(3)]


def test_an_alias_is_made_switched_and_remembers(server: Any, adapters: list[str]) -> None:
    client, (first, second, _) = server.client, adapters
    made = client.put("/aliases/orders", json={"adapter": first})
    assert (made.status_code, made.json()["version"], made.headers["etag"]) == (201, 1, '"1"')
    same = client.put("/aliases/orders", json={"adapter": first})
    assert (same.status_code, same.headers["etag"]) == (200, '"1"')
    switched = client.put("/aliases/orders", json={"adapter": second}, headers={"If-Match": '"1"'})
    assert (switched.status_code, switched.json()["adapter"], switched.headers["etag"]) == (200, second, '"2"')
    late = client.put("/aliases/orders", json={"adapter": first}, headers={"If-Match": '"1"'})
    assert (late.status_code, late.json()["code"]) == (412, "precondition_failed")
    absent = client.put("/aliases/others", json={"adapter": first}, headers={"If-Match": '"1"'})
    assert absent.status_code == 412
    assert client.get("/aliases/others").status_code == 404
    shown = client.get("/aliases/orders")
    assert shown.json() == switched.json()
    assert shown.headers["etag"] == '"2"'
    history = [(item["version"], item["adapter"], item["job"]) for item in shown.json()["switches"]]
    assert history == [(2, second, None), (1, first, None)]
    client.put("/aliases/newer", json={"adapter": first})
    page = client.get("/aliases", params={"limit": 1}).json()
    assert [item["name"] for item in page["items"]] == ["newer"]
    rest = client.get("/aliases", params={"limit": 1, "cursor": page["next"]}).json()
    assert ([item["name"] for item in rest["items"]], rest["next"]) == (["orders"], None)


def test_an_adapter_with_an_alias_can_not_be_deleted(server: Any, adapters: list[str]) -> None:
    client, (first, second, _) = server.client, adapters
    client.put("/aliases/orders", json={"adapter": first})
    refused = client.delete(f"/adapters/{first}")
    assert (refused.status_code, refused.json()["code"]) == (409, "state_conflict")
    assert "orders" in refused.json()["detail"]
    client.put("/aliases/orders", json={"adapter": second})
    assert client.delete(f"/adapters/{first}").status_code == 204
    gone = client.put("/aliases/orders", json={"adapter": first})
    assert (gone.status_code, gone.json()["errors"][0]["pointer"]) == (422, "/adapter")
    assert client.get("/aliases/orders").json()["switches"][1]["adapter"] == first, "the history keeps it"
    assert client.delete("/aliases/orders", headers={"If-Match": '"1"'}).status_code == 412
    assert client.delete("/aliases/orders").status_code == 204
    assert client.delete("/aliases/orders").status_code == 404
    assert client.put("/aliases/orders", json={"adapter": second}).json()["version"] == 1
    client.delete("/aliases/orders")
    assert client.delete(f"/adapters/{second}").status_code == 204


def test_a_download_by_alias_leads_to_where_it_points_now(server: Any, adapters: list[str]) -> None:
    client, (first, second, _) = server.client, adapters
    client.put("/aliases/orders", json={"adapter": first})
    led = client.get("/aliases/orders/download", follow_redirects=False)
    assert (led.status_code, led.headers["cache-control"]) == (307, "no-store")
    assert led.headers["location"] == f"/adapters/{first}/download?format=peft"
    client.put("/aliases/orders", json={"adapter": second})
    found = client.get("/aliases/orders/download", params={"format": "safetensors"}, follow_redirects=True)
    assert found.content == client.get(f"/adapters/{second}/download?format=safetensors").content
    assert client.get("/aliases/nobody/download", follow_redirects=False).status_code == 404
    assert client.get("/adapters/orders").status_code == 422, "ids stay ids"


@pytest.mark.parametrize("name", ["Orders", "-orders", "a b", "o" * 101, "%00", "ä"])
def test_a_name_that_can_be_none_is_refused(server: Any, name: str) -> None:
    answer = server.client.put(f"/aliases/{name}", json={"adapter": "adp_" + "0" * 32})
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"][0]["pointer"] == "/path/name"
